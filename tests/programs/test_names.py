"""Unusual file names: no program fails, no line of output is broken, and no file is replaced."""

import base64
import io
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from evit_jax import cli
from evit_jax.data.names import FileNames, in_json, in_one_line, valid_text
from evit_jax.inference.images import find_images
from evit_jax.viz import page
from tests.helpers import layouts, tiny

ODD = ['bad\udcff\udcfe.png', 'new\nline.png', 'esc\x1b[31m.png', 'L' * 251 + '.png', 'ü' * 125 + '.png', 'a.png',
       'b/a.png', 'A.png', '-.png']


@pytest.mark.parametrize(('name', 'line'), [
    ('plain ü 猫.png', 'plain ü 猫.png'), ('a\nb\r\t', r'a\nb\r\t'), ('\udcff', r'\xff'), ('\ud800', r'\ud800'),
    ('\x1b[0m\u2028\u202e', r'\x1b[0m\u2028\u202e')])
def test_in_one_line_escapes_only_characters_that_break_a_line(name, line):
    assert in_one_line(name) == line and len(in_one_line(name).splitlines()) == 1
    in_one_line(name).encode()
    valid_text(name).encode()


@pytest.mark.parametrize('name', ODD)
def test_in_json_gives_the_exact_name_in_valid_utf8(name):
    fields = json.loads(json.dumps(in_json(name), ensure_ascii=False).encode())
    exact = base64.b64decode(fields['image_base64']) if 'image_base64' in fields else fields['image'].encode()
    assert exact == os.fsencode(name)


def test_file_names_are_short_and_distinct_and_stay_in_their_folder(tmp_path):
    names = FileNames(tmp_path, taken=[str(tmp_path / 'c_kept.png'), '/elsewhere/d_kept.png'])
    others = ['../..', '/', 'c.png', 'd.png', 'cafe\u0301.x', 'caf\u00e9.x']
    made = [names.of(name, '_kept.png') for name in [*ODD, *others]]
    assert made[5:8] == ['a_kept.png', 'a_kept_2.png', 'A_kept_3.png']
    assert made[-4:] == ['c_kept_2.png', 'd_kept.png', 'cafe\u0301_kept.png', 'caf\u00e9_kept_2.png']
    for name in made:
        (tmp_path / name).write_bytes(b'')
        assert '\n' not in name and os.path.dirname(name) == ''
    assert len(list(tmp_path.iterdir())) == len(made)


def test_names_on_standard_input_may_be_any_bytes(monkeypatch):
    monkeypatch.setattr(sys, 'stdin', types.SimpleNamespace(buffer=io.BytesIO(b'\xef\xbb\xbfa.png\r\n\xff.png\n')))
    assert find_images(['-'], cli.names_on_stdin()) == ['a.png', '\udcff.png']


def test_kept_grid_class_name_without_glyphs_is_drawn():
    assert page.write(Image.new('RGB', (200, 40)), 0, 0, 'a\nb\udcff', page.DARK, 12, 150) > 0


@pytest.fixture
def odd(tmp_path):
    folder = tmp_path / 'odd'
    (folder / 'b').mkdir(parents=True)
    for number, name in enumerate(ODD):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        with open(folder / name, 'wb') as file:
            Image.fromarray(pixels).save(file, 'PNG')
    (folder / 'broken.png').write_bytes(b'torn')
    return folder


def test_predict_gives_every_odd_name_a_line_and_a_picture(odd, tmp_path):
    checkpoint, start = tmp_path / 'weights', [sys.executable, '-m', 'evit_jax.predict']
    tiny.model().save(checkpoint)
    done = subprocess.run([*start, checkpoint, odd, f'--kept={tmp_path / "kept"}'], cwd=layouts.ROOT,
                          capture_output=True, env=os.environ | {'PYTHONIOENCODING': 'ascii'})
    assert done.returncode == 1, done.stderr
    lines = done.stdout.decode('ascii').splitlines()
    assert len(lines) == len(ODD) and all(line.count(' %') == 3 for line in lines)
    assert len(list((tmp_path / 'kept').iterdir())) == len(ODD)
    done = subprocess.run([*start, checkpoint, odd, '--json'], cwd=layouts.ROOT, capture_output=True)
    rows = [json.loads(line) for line in done.stdout.decode().splitlines()]
    names = [base64.b64decode(row['image_base64']) if 'image_base64' in row else row['image'].encode() for row in rows]
    assert {*names} == {os.fsencode(odd / name) for name in [*ODD, 'broken.png']}
