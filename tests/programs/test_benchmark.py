"""The measurements, on next to nothing: what they report adds up and says where it was measured."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from evit_jax.benchmarks import input as inputs
from evit_jax.benchmarks import report
from evit_jax.data.sources.generated import GeneratedSource
from evit_jax.data.transforms.geometry import TrainTransform

ROOT = pathlib.Path(__file__).parents[2]


def measure(source, **changes):
    arguments = {'batch_size': 4, 'repeats': 3, 'workers': 0, 'seconds': 0.3, 'transform': TrainTransform(32)}
    return {tally.name: tally for tally in inputs.measure(source, **arguments | changes)}


def test_every_stage_is_measured_and_an_image_shown_costs_a_third_of_a_decoding():
    found = measure(GeneratedSource('train', 32, 5, encoded=(160, 120)))
    assert list(found) == ['read', 'decode', 'crop', 'augment', 'collate', 'pipeline, a thread', 'plain Pillow']
    for tally in found.values():
        assert tally.images > 0 and tally.seconds > 0
    decode = found['decode']
    assert decode.microseconds == pytest.approx(1e6 * decode.cpu_seconds / decode.images / 3)
    assert found['crop'].microseconds == pytest.approx(1e6 * found['crop'].cpu_seconds / found['crop'].images)


def test_the_workers_time_is_counted(monkeypatch):
    monkeypatch.setattr(inputs, '_ROUNDS', 1)
    found = measure(GeneratedSource('train', 32, 5, encoded=(160, 120)), workers=1, seconds=1.0)
    worker = found['pipeline, 1 workers']
    assert worker.images > 0 and worker.cpu_seconds > 0.1 * worker.seconds


def test_arrays_have_no_plain_pipeline_beside_them():
    assert 'plain Pillow' not in measure(GeneratedSource('train', 32, 5))


def test_augmenting_is_what_it_takes_beyond_cropping():
    both, crop = inputs.Tally('both', images=10, seconds=3.0, cpu_seconds=2.0), inputs.Tally('crop', 20, 2.0, 2.0)
    augment = both.less(crop, 'augment')
    assert (augment.name, augment.images, augment.seconds, augment.cpu_seconds) == ('augment', 10, 2.0, 1.0)


class Unreadable:
    num_classes, class_names, image_size = 2, ('a', 'b'), None

    def __len__(self):
        return 9

    def __getitem__(self, index):
        return {'image': b'', 'label': 0, 'id': str(index)}


def test_data_without_a_readable_image_are_refused():
    with pytest.raises(ValueError, match='none of 9 examples tried can be read'):
        measure(Unreadable())


def test_columns_are_aligned():
    lines = report.table(('', 'images/s'), [('read', '1,000'), ('a long name', '7')]).splitlines()
    assert lines == ['             images/s', '---------------------', 'read            1,000', 'a long name         7']


def test_a_file_says_what_was_measured_where_and_when(tmp_path):
    report.write_json(tmp_path / 'deep' / 'file.json', {'rows': [1]})
    written = json.loads((tmp_path / 'deep' / 'file.json').read_text())
    assert written['rows'] == [1]
    assert re.fullmatch(r'\d{4}-\d\d-\d\dT.*', written['machine']['date'])
    assert written['machine']['versions']['numpy'] == np.__version__ and written['machine']['cpus'] >= 1


def run(*arguments):
    return subprocess.run([sys.executable, '-m', 'evit_jax.benchmark', *arguments], cwd=ROOT, capture_output=True,
                          text=True)


def test_the_program_falls_back_on_generated_images_prints_a_table_and_writes_json(tmp_path):
    done = run('input', '--config', 'configs/base.py', '--config.data.source=folder',
               f'--config.data.path={tmp_path / "none"}', '--config.model.image_size=32', '--seconds=0.4',
               '--workers=0', '--batch=4', f'--json={tmp_path / "input.json"}')
    assert done.returncode == 0, done.stderr
    assert 'generated images, as the data are not there: ' in done.stdout
    assert 'generated JPEGs of 500 x 375' in done.stdout
    assert re.search(r'plain Pillow +[\d,]+ +[\d,]+ +[\d,]+', done.stdout)
    rows = json.loads((tmp_path / 'input.json').read_text())['rows']
    assert [row['name'] for row in rows][:2] == ['read', 'decode'] and rows[0]['images_per_cpu_second'] > 0


def test_the_program_ends_with_one_line_on_a_wrong_command():
    done = run('inptu', '--config', 'configs/base.py')
    assert (done.returncode, done.stderr) == (2, 'error: say input or model or tpu before the flags, not inptu\n')


def test_help_shows_the_flags():
    done = run('--help')
    assert done.returncode == 0 and '--workers' in done.stdout and 'Measures: python -m' in done.stdout
