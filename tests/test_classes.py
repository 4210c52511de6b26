"""Names of classes: ImageNet's where they are meant, and nobody else's replaced."""

from evit_jax.data.classes import names_of, readable


def test_the_thousand_names_are_in_the_order_of_imagenets_labels_and_tell_all_apart():
    names = names_of(1000)
    assert len(set(names)) == 1000
    assert [names[label] for label in (0, 134, 207, 281, 517, 999)] == [
        'tench', 'crane bird', 'golden retriever', 'tabby', 'crane', 'toilet tissue']


def test_other_counts_have_numbers():
    assert names_of(3) == ('0', '1', '2')


def test_synsets_and_bare_numbers_of_imagenet_become_names_wherever_they_stand():
    assert readable(['n02099601', 'n01440764', 'n00000000']) == ('golden retriever', 'tench', 'n00000000')
    assert readable(list(map(str, range(1000)))) == names_of(1000)


def test_names_of_other_data_stay():
    for names in (('cat', 'dog'), tuple('0123456789'), tuple(map(str, range(1, 1001))), ()):
        assert readable(names) == names
