"""Class folders and files whose names are no text, no line, or one text in two forms."""

import json
import os
import unicodedata

import pytest

from evit_jax.data.classes import display_name, lookalikes
from evit_jax.data.sources import open_source
from evit_jax.data.sources.folder import FolderSource
from tests.helpers.folders import examples, fill

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD'))


@pytest.mark.parametrize('name, shown', [
    ('cat', 'cat'), ('café', 'café'), ('\u0646\u200c\u062e', '\u0646\u200c\u062e'), ('a\\b', 'a\\b'),
    ('caf\udce9', r'caf\xe9'), ('a\nb\r', r'a\nb\r'), ('\x1b[31m', r'\x1b[31m'), ('a\u2028b', r'a\u2028b')])
def test_displayed_is_one_line_of_text(name, shown):
    assert display_name(name) == shown == display_name(shown)
    assert shown.encode() and len(shown.splitlines()) == 1


def test_displayed_is_the_same_for_both_forms_of_unicode():
    assert COMPOSED != DECOMPOSED and display_name(DECOMPOSED) == display_name(COMPOSED) == COMPOSED


def test_lookalikes_differ_in_case_spaces_or_marks_only():
    assert lookalikes(['cat', 'Cat', 'dog', 'dog ', '\ufeffowl', 'owl', 'ant']) == [
        ('cat', 'Cat'), ('dog', 'dog '), ('\ufeffowl', 'owl')]


def test_folder_source_odd_names_are_lines_of_text_and_files_are_read(tmp_path):
    odd = ['caf\udce9', 'a\nb', 'x' * 250, 'esc\x1b[31m', '-rf', 'a\u2028b']
    for name in odd:
        folder = os.fsencode(tmp_path / 'train') + b'/' + os.fsencode(name)
        os.makedirs(folder)
        for number in range(2):
            with open(folder + b'/im\nage\xff%d.jpg' % number, 'wb') as file:
                file.write(os.fsencode(name))
    source = FolderSource(tmp_path, 'train[:100%]')
    assert source.class_names == tuple(sorted(map(display_name, odd)))
    found = examples(tmp_path, 'train[:100%]')
    assert len(found) == len({example['id'] for example in found}) == 12
    for example in found:
        assert example['id'].encode() and len(example['id'].splitlines()) == 1
        assert source.class_names[example['label']] == display_name(os.fsdecode(example['image']))
    assert json.dumps(source.class_names, ensure_ascii=False).encode()


def test_folder_source_classes_of_train_and_val_in_two_forms_are_the_same(tmp_path):
    fill(tmp_path / 'train', {COMPOSED: 2, 'cafz': 2, 'dog': 1})
    fill(tmp_path / 'val', {DECOMPOSED: 2, 'dog': 1})
    assert FolderSource(tmp_path, 'train').class_names == ('cafz', COMPOSED, 'dog')
    assert [example['label'] for example in examples(tmp_path, 'val')] == [1, 1, 2]


def test_folder_source_order_of_classes_is_that_of_either_form(tmp_path):
    for number, form in enumerate((COMPOSED, DECOMPOSED)):
        fill(tmp_path / str(number) / 'train', {form: 2, 'cafz': 2})
    first, second = (FolderSource(tmp_path / str(number), 'train[:100%]') for number in range(2))
    assert first.class_names == second.class_names == ('cafz', COMPOSED)


def test_folder_source_one_class_in_two_forms_is_refused(tmp_path):
    fill(tmp_path / 'train', {COMPOSED: 2, DECOMPOSED: 2})
    with pytest.raises(ValueError, match=r"two folders of the class 'café', in two forms of Unicode \('cafe\\u0301' "
                                         r"and 'caf\\xe9'\): move the images of one"):
        FolderSource(tmp_path, 'train')


def test_folder_source_two_names_displayed_alike_are_refused_for_that_reason(tmp_path):
    fill(tmp_path / 'train', {'a\nb': 2, 'a\\nb': 2})
    with pytest.raises(ValueError, match=r"two folders of the class '.*', which are displayed alike \(.*or rename one"):
        FolderSource(tmp_path, 'train')


def test_open_source_classes_that_differ_in_case_stay_two_and_are_warned_of(tmp_path, caplog):
    fill(tmp_path / 'train', {'a': 5, 'A': 5, 'b': 5})
    assert open_source('folder', 'train', path=tmp_path).class_names == ('A', 'a', 'b')
    assert "differ only in case or spaces: 'A' and 'a'" in caplog.text


@pytest.mark.parametrize('name', ['Cat', 'cat ', '\ufeffcat'])
def test_folder_source_class_of_val_with_another_spelling_is_refused_by_both_names(tmp_path, name):
    fill(tmp_path / 'train', {'cat': 2, 'dog': 2})
    fill(tmp_path / 'val', {name: 2})
    with pytest.raises(ValueError, match="differs from 'cat' of train/ only in case or spaces: rename the folder"):
        FolderSource(tmp_path, 'val')
