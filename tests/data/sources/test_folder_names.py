"""Tests of class folders and files with invalid, multi-line or equivalent Unicode names."""

import json
import os
import unicodedata

import pytest

from evit_jax.data.classes import display_name
from evit_jax.data.sources import open_source
from evit_jax.data.sources.folder import FolderSource
from tests.helpers.folders import examples, fill

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD'))


def test_folder_source_odd_names_are_displayed_as_one_line_and_read(tmp_path):
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


def test_folder_source_classes_in_two_unicode_forms_are_equal(tmp_path):
    fill(tmp_path / 'train', {COMPOSED: 2, 'cafz': 2, 'dog': 1})
    fill(tmp_path / 'val', {DECOMPOSED: 2, 'dog': 1})
    assert FolderSource(tmp_path, 'train').class_names == ('cafz', COMPOSED, 'dog')
    assert [example['label'] for example in examples(tmp_path, 'val')] == [1, 1, 2]


def test_folder_source_order_of_classes_is_independent_of_the_unicode_form(tmp_path):
    for number, form in enumerate((COMPOSED, DECOMPOSED)):
        fill(tmp_path / str(number) / 'train', {form: 2, 'cafz': 2})
    first, second = (FolderSource(tmp_path / str(number), 'train[:100%]') for number in range(2))
    assert first.class_names == second.class_names == ('cafz', COMPOSED)


def test_folder_source_one_class_in_two_unicode_forms_raises(tmp_path):
    fill(tmp_path / 'train', {COMPOSED: 2, DECOMPOSED: 2})
    with pytest.raises(ValueError, match=r"two folders of the class 'café', in two forms of Unicode \('cafe\\u0301' "
                                         r"and 'caf\\xe9'\): move the images of one"):
        FolderSource(tmp_path, 'train')


def test_folder_source_two_names_displayed_alike_raise(tmp_path):
    fill(tmp_path / 'train', {'a\nb': 2, 'a\\nb': 2})
    with pytest.raises(ValueError, match=r"two folders of the class '.*', which are displayed alike \(.*or rename one"):
        FolderSource(tmp_path, 'train')


def test_open_source_classes_that_differ_in_case_are_kept_with_a_warning(tmp_path, caplog):
    fill(tmp_path / 'train', {'a': 5, 'A': 5, 'b': 5})
    assert open_source('folder', 'train', path=tmp_path).class_names == ('A', 'a', 'b')
    assert "differ only in case or spaces: 'A' and 'a'" in caplog.text


@pytest.mark.parametrize('name', ['Cat', 'cat ', '\ufeffcat'])
def test_folder_source_class_of_val_spelled_differently_raises_with_both_names(tmp_path, name):
    fill(tmp_path / 'train', {'cat': 2, 'dog': 2})
    fill(tmp_path / 'val', {name: 2})
    with pytest.raises(ValueError, match="differs from 'cat' of train/ only in case or spaces: rename the folder"):
        FolderSource(tmp_path, 'val')
