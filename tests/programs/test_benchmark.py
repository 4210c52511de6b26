"""The benchmark program: its output, its files and its errors."""

import functools
import json
import logging
import pathlib
import re
import subprocess
import sys
import types

import pytest

from evit_jax.benchmarks import cases
from tests.helpers import program_modules, programs

benchmark = program_modules.module_fixture('benchmark')
ROOT = pathlib.Path(__file__).parents[2]


def run(*arguments):
    return subprocess.run([sys.executable, '-m', 'evit_jax.benchmark', *arguments], cwd=ROOT, capture_output=True,
                          text=True)


@pytest.fixture
def run_here(benchmark):
    """Returns a function that runs the program in this process and returns exit code and printed errors."""
    commands = {'input': benchmark.measure_input, 'model': benchmark.measure_model, 'tpu': benchmark.compile_for_tpu}
    return functools.partial(programs.run, types.SimpleNamespace(__name__='benchmark', main=commands), ())


def test_input_without_data_measures_generated_images_and_writes_json(run_here, tmp_path, capsys):
    done = run_here('input', '--config', 'configs/base.py', '--config.data.source=folder',
                    f'--config.data.path={tmp_path / "none"}', '--config.model.image_size=32', '--seconds=0.4',
                    '--workers=0', '--batch=4', f'--json={tmp_path / "input.json"}')
    assert done == (0, '')
    printed = capsys.readouterr().out
    assert 'generated images, as the data are missing: ' in printed
    assert 'generated JPEGs of 500 x 375' in printed
    assert re.search(r'plain Pillow +[\d,]+ +[\d,]+ +[\d,]+', printed)
    rows = json.loads((tmp_path / 'input.json').read_text())['rows']
    assert [row['name'] for row in rows][:2] == ['read', 'decode'] and rows[0]['images_per_cpu_second'] > 0


def test_model_prints_a_table_and_writes_json_and_markdown(run_here, tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level(logging.INFO, 'absl')
    monkeypatch.setattr(cases, '_MATMUL_SIZES', {'cpu': 64})
    code, errors = run_here('model', '--models=vit_digits', '--rates=0.5', '--batches=1', '--rounds=2', '--seconds=0.2',
                            f'--json={tmp_path / "m.json"}', f'--markdown={tmp_path / "m.md"}')
    assert code == 0, errors
    printed = capsys.readouterr().out
    assert re.search(r'vit_digits 0.5 fused, 64 px, batch 1, float32 +0\.37 +0\.0163 +0\.0159 ', printed)
    assert 'about' in caplog.text and 'round 2 of 2' in caplog.text
    written = json.loads((tmp_path / 'm.json').read_text())
    assert written['machine']['date'] and written['rows'][0]['macs'] == 16300160
    assert '| vit_digits 0.5 fused' in (tmp_path / 'm.md').read_text()


@pytest.mark.parametrize('arguments, message', [
    (('--image_sizes=64,x',),
     'error: --image_sizes=x must be a side or HEIGHTxWIDTH in pixels, such as 224 or 224x112'),
    (('--dtypes=float8',), "error: --dtypes=float8: 'float8' is unknown, there are float32, bfloat16"),
    (('--against=onnx',), "error: --against=onnx: 'onnx' is unknown, there are torch, onnxruntime, openvino"),
    (('--precision=bfloat16',), 'error: --precision=bfloat16 is for engines that run ONNX files: add '
                                '--against=onnxruntime,openvino, or give --dtypes for JAX and PyTorch'),
    (('--train',), 'error: give --config FILE, as in: python -m evit_jax.benchmark model --train --config '
                   'configs/deit_s.py')])
def test_model_with_a_bad_flag_exits_with_one_line(run_here, arguments, message):
    assert run_here('model', *arguments) == (2, message)


def test_tpu_without_topology_exits_with_an_example(run_here):
    assert run_here('tpu', '--config', 'configs/digits.py') == (
        2, 'error: give --topology SLICE, as in: python -m evit_jax.benchmark tpu --config configs/deit_s.py '
        '--topology v5e:16x16')


def test_unknown_command_exits_with_one_line():
    done = run('inptu', '--config', 'configs/base.py')
    message = 'error: give input or model or serve or gpu or tpu before the flags, not inptu\n'
    assert (done.returncode, done.stderr) == (2, message)


def test_help_prints_usage_and_flags():
    done = run('--help')
    assert done.returncode == 0 and '--workers' in done.stdout and 'Measures speed: python -m' in done.stdout
