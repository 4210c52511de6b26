"""Names of classes: ImageNet's where they are meant, and nobody else's replaced."""

import logging

from evit_jax.data.classes import default_class_names, readable_names, same_classes


def test_the_thousand_names_are_in_the_order_of_imagenets_labels_and_tell_all_apart():
    names = default_class_names(1000)
    assert len(set(names)) == 1000
    assert [names[label] for label in (0, 134, 207, 281, 517, 999)] == [
        'tench', 'crane bird', 'golden retriever', 'tabby', 'crane', 'toilet tissue']


def test_other_counts_have_numbers():
    assert default_class_names(3) == ('0', '1', '2')


def test_names_of_a_thousand_classes_logs_that_imagenet_is_assumed(caplog):
    with caplog.at_level(logging.INFO):
        default_class_names(10)
        assert not caplog.records
        default_class_names(1000)
    assert '1000 classes are assumed to be those of ImageNet-1k' in caplog.text


def test_synsets_of_imagenet_become_names_wherever_they_stand():
    assert readable_names(['n02099601', 'n01440764', 'n00000000']) == ('golden retriever', 'tench', 'n00000000')


def test_readable_numbers_of_a_thousand_own_classes_stay_numbers():
    numbers = tuple(map(str, range(1000)))
    assert readable_names(numbers) == numbers and readable_names(sorted(numbers)) == tuple(sorted(numbers))


def test_readable_class_with_a_synset_s_name_keeps_both_apart():
    assert readable_names(['n01440764', 'n02099601', 'tench']) == ('n01440764', 'golden retriever', 'tench')


def test_readable_names_from_outside_are_printable():
    assert readable_names(['a\nb', 'caf\udce9', 'cafe\u0301']) == (r'a\nb', r'caf\xe9', 'caf\xe9')


def test_same_classes_takes_numbers_for_imagenets_names_and_no_others():
    numbers = list(map(str, range(1000)))
    assert same_classes(numbers, default_class_names(1000)) and same_classes(default_class_names(1000), numbers)
    assert same_classes(['cat', 'dog'], ('cat', 'dog'))
    assert not same_classes(['0', '1'], ['cat', 'dog'])
    assert not same_classes([f'class {label}' for label in range(1000)], default_class_names(1000))


def test_names_of_other_data_stay():
    for names in (('cat', 'dog'), tuple('0123456789'), tuple(map(str, range(1, 1001))), ()):
        assert readable_names(names) == names
