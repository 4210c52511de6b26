"""Regenerates the tables of the EViT paper: python -m evit_jax.paper --data IMAGENET --weights WEIGHTS --table all

For every row the program computes multiply-accumulates and parameters. A row whose weights exist is evaluated on
IMAGENET/val; for the others it prints the training command and its cost. The folder --out receives paper.md, paper.json
and the result of each evaluated row; a second call skips these rows.

WEIGHTS has one file or folder per name in the column "weights", such as deit_s-1-224.pth or deit_s-0.7-fused-224/: a
run, a converted folder, or a published file (.pth, .safetensors). The table training_free needs deit_s-1-224 alone.
IMAGENET has train/ and val/ with one folder for each class.

Two results of the paper have programs of their own: `python -m evit_jax.visualize drop` draws the accuracy after random
removal of tokens on and off the object (the motivation), and `python -m evit_jax.benchmark model` measures speeds.
"""

import json
import pathlib

from absl import flags, logging

from evit_jax import api, cli
from evit_jax.benchmarks import report
from evit_jax.comparison.paper_rows import TABLES, PaperRow
from evit_jax.inference.model import VisionModel

PROGRAMS = {  # tables without rows -> the program that measures them
    'motivation': 'python -m evit_jax.visualize drop {weights}/deit_s-1-224 --masks=MASKS --config=CONFIG',
    'tradeoff': 'python -m evit_jax.benchmark model --models=deit_s,lvvit_s --rates=1,0.9,0.8,0.7,0.6,0.5'}
_SUFFIXES = '', '.pth', '.pth.tar', '.safetensors'
_HEAD = ['row', 'weights', 'size', 'G MACs', 'ours', 'M parameters, ours', 'top-1', 'ours', 'top-5', 'ours',
         'speed-up, paper']
_OPERATIONS = 2  # per multiply-accumulate

_DATA = flags.DEFINE_string('data', '', 'Folder of ImageNet with train/ and val/; empty: no row is evaluated.')
_WEIGHTS = flags.DEFINE_string('weights', 'weights', 'Folder of the weights.')
_TABLE = flags.DEFINE_list('table', ['all'], f'Tables: {", ".join((*TABLES, *PROGRAMS))}, or all.')
_OUT = flags.DEFINE_string('out', 'runs/paper', 'Folder of the results.')
_TFLOPS = flags.DEFINE_float('tflops', 100.0, 'Operations per second that the training reaches on one device, in '
                             '10^12; for the costs. 100 is about a third of the peak of an A100 in bfloat16.')


def main() -> None:
    """Evaluates the rows whose weights exist, and writes the tables."""
    names = [*TABLES, *PROGRAMS] if 'all' in _TABLE.value else _TABLE.value
    if unknown := [name for name in names if name not in TABLES and name not in PROGRAMS]:
        raise ValueError(f'--table={unknown[0]} is no table: there are {", ".join((*TABLES, *PROGRAMS))}, and all')
    if _DATA.value and not (pathlib.Path(_DATA.value).expanduser() / 'val').is_dir():
        raise ValueError(f'--data={_DATA.value} has no folder val: give a folder with train/CLASS/ and val/CLASS/')
    if not _TFLOPS.value > 0:
        raise ValueError(f'--tflops={_TFLOPS.value:g} is not positive: give the operations per second in 10^12')
    out = pathlib.Path(_OUT.value).expanduser()
    report.check_writable('--out', out / 'paper.md')
    rows = [row for name in names for row in TABLES.get(name, ())]
    results = {row: _evaluated(row, out) for row in rows}
    text = '\n\n'.join(['# Tables of the EViT paper', *(_section(name, results) for name in names)]) + '\n'
    (out / 'paper.md').write_text(text)
    report.write_json(out / 'paper.json', {'rows': [
        row._asdict() | {'macs': row.macs, 'parameters': row.parameters, 'measured': results[row],
                         'device_hours': device_hours(row, _TFLOPS.value)} for row in rows]})
    print(text)


def device_hours(row: PaperRow, tflops: float) -> float:
    """Returns the hours that the training of a row takes on one device, by its operations alone.

    Args:
      tflops: operations per second of the device in this training, in 10^12.
    """
    return _OPERATIONS * row.training_macs() / (tflops * 1e12) / 3600 if row.epochs else 0.0


def weights_of(row: PaperRow, folder: pathlib.Path) -> pathlib.Path | None:
    """Returns the weights of a row in a folder; None if there are none."""
    paths = (folder / f'{row.weights}{suffix}' for suffix in _SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def _evaluated(row, out):
    """Returns the metrics of a row; None if its weights or the data are missing."""
    file = out / f'{row.table}-{row.name}.json'
    if file.exists():
        return json.loads(file.read_text())
    path = weights_of(row, pathlib.Path(_WEIGHTS.value).expanduser())
    if not _DATA.value or path is None:
        return None
    logging.info('%s, %s: evaluating %s', row.table, row.name, path)
    model = api.load(path)
    loaded = model.loaded._replace(budget=model.loaded.budget._replace(fuse=row.fuse), image_size=row.size)
    model = VisionModel(loaded).with_plan(plan=row.plan)
    result = api.evaluate(model, str(pathlib.Path(_DATA.value).expanduser() / 'val'))
    file.write_text(json.dumps(result) + '\n')
    return result


def _section(name, results):
    """Returns the Markdown of one table: figures, and the commands of the rows that were not evaluated."""
    if name in PROGRAMS:
        return f'## {name}\n\n    {PROGRAMS[name].format(weights=_WEIGHTS.value)}'
    rows = TABLES[name]
    parts = [f'## {name}', report.markdown_table(_HEAD, [_cells(row, results[row]) for row in rows])]
    data = _DATA.value or 'IMAGENET'
    commands = [f'    # {row.name}: {device_hours(row, _TFLOPS.value):.0f} device-hours at {_TFLOPS.value:g} TFLOP/s\n'
                f'    {row.command(data, _WEIGHTS.value)}' for row in rows if row.epochs and results[row] is None]
    return '\n\n'.join([*parts, *(['\n'.join(commands)] if commands else [])])


def _cells(row: PaperRow, result: dict[str, float] | None) -> list[str]:
    dense = TABLES['lvvit' if row.model == 'lvvit_s' else 'deit'][0].speed
    method = 'DynamicViT' if row.reducer == 'dynamicvit' else 'dense' if row.rate == 1 else 'EViT'
    fused = ', not fused' if method == 'EViT' and not row.fuse else ''
    trained = f', {row.epochs} epochs' if row.epochs else ''
    measured = ['', ''] if result is None else [f'{100 * result[key]:.1f}' for key in ('top1', 'top5')]
    return [f'{method} {row.rate:g}{fused}{trained}', row.weights, str(row.size), _figure(row.gmacs),
            f'{row.macs / 1e9:.2f}', f'{row.parameters / 1e6:.2f}', _figure(row.top1), measured[0], _figure(row.top5),
            measured[1], f'{row.speed / dense:.2f}x' if row.speed else '']


def _figure(value):
    return '' if value is None else f'{value:.1f}'


if __name__ == '__main__':
    cli.run(main)
