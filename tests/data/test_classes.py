"""Tests of class names of ImageNet and of other data."""

import logging
import unicodedata

import pytest

from evit_jax.data.classes import (
    default_class_names,
    display_name,
    lookalikes,
    readable_names,
    same_classes,
)


def test_default_class_names_of_1000_classes_are_unique_and_in_the_order_of_imagenet():
    names = default_class_names(1000)
    assert len(set(names)) == 1000
    assert [names[label] for label in (0, 134, 207, 281, 517, 999)] == [
        'tench', 'crane bird', 'golden retriever', 'tabby', 'crane', 'toilet tissue']


def test_default_class_names_of_other_counts_are_numbers():
    assert default_class_names(3) == ('0', '1', '2')


def test_default_class_names_of_1000_classes_logs_the_assumption(caplog):
    with caplog.at_level(logging.INFO):
        default_class_names(10)
        assert not caplog.records
        default_class_names(1000)
    assert '1000 classes are assumed to be those of ImageNet-1k' in caplog.text


def test_readable_names_replaces_synsets_at_any_position():
    assert readable_names(['n02099601', 'n01440764', 'n00000000']) == ('golden retriever', 'tench', 'n00000000')


def test_readable_names_of_1000_numbers_returns_them():
    numbers = tuple(map(str, range(1000)))
    assert readable_names(numbers) == numbers and readable_names(sorted(numbers)) == tuple(sorted(numbers))


def test_readable_names_class_named_like_a_synset_keeps_names_unique():
    assert readable_names(['n01440764', 'n02099601', 'tench']) == ('n01440764', 'golden retriever', 'tench')


def test_readable_names_of_any_bytes_are_printable():
    assert readable_names(['a\nb', 'caf\udce9', 'cafe\u0301']) == (r'a\nb', r'caf\xe9', 'caf\xe9')


def test_same_classes_accepts_numbers_for_imagenet_names_only():
    numbers = list(map(str, range(1000)))
    assert same_classes(numbers, default_class_names(1000)) and same_classes(default_class_names(1000), numbers)
    assert same_classes(['cat', 'dog'], ('cat', 'dog'))
    assert not same_classes(['0', '1'], ['cat', 'dog'])
    assert not same_classes([f'class {label}' for label in range(1000)], default_class_names(1000))


def test_readable_names_of_other_data_returns_them():
    for names in (('cat', 'dog'), tuple('0123456789'), tuple(map(str, range(1, 1001))), ()):
        assert readable_names(names) == names


@pytest.mark.parametrize('name, shown', [
    ('cat', 'cat'), ('café', 'café'), ('\u0646\u200c\u062e', '\u0646\u200c\u062e'), ('a\\b', 'a\\b'),
    ('caf\udce9', r'caf\xe9'), ('a\nb\r', r'a\nb\r'), ('\x1b[31m', r'\x1b[31m'), ('a\u2028b', r'a\u2028b')])
def test_display_name_returns_one_line_of_text(name, shown):
    assert display_name(name) == shown == display_name(shown)
    assert shown.encode() and len(shown.splitlines()) == 1


def test_display_name_of_both_unicode_forms_is_equal():
    composed, decomposed = (unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD'))
    assert composed != decomposed and display_name(decomposed) == display_name(composed) == composed


def test_lookalikes_returns_pairs_that_differ_in_case_spaces_or_marks():
    assert lookalikes(['cat', 'Cat', 'dog', 'dog ', '\ufeffowl', 'owl', 'ant']) == [
        ('cat', 'Cat'), ('dog', 'dog '), ('\ufeffowl', 'owl')]
