"""Compares methods of dropping tokens: python -m evit_jax.compare --config configs/compare_digits.py --out runs/compare

Each method has the same data, seeds, steps and share of the dense model's multiply-accumulates: put into a trained
dense model, fine-tuned from it, and trained from scratch. The folder gets a workdir for each run, and in the end
compare.md, compare.png and compare.json. Told to stop it ends with code 75; the same command goes on from there.

--docs FOLDER writes these three files there too.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from evit_jax import cli
from evit_jax.benchmarks import report
from evit_jax.comparison import verdict
from evit_jax.comparison.cells import DENSE
from evit_jax.comparison.running import compare
from evit_jax.runtime import distributed
from evit_jax.runtime.preemption import Preempted
from evit_jax.viz.comparison import Point, comparison_plot

_CONFIG = config_flags.DEFINE_config_file('config', None, 'What is compared, as configs/compare_digits.py.')
_OUT = flags.DEFINE_string('out', None, 'Folder of the runs and of what they show.')
_DOCS = flags.DEFINE_string('docs', None, 'Another folder for what they show.')


def main() -> None:
    """Runs what has not run yet, and writes tables and plot."""
    if _CONFIG.value is None or _OUT.value is None:
        raise ValueError('give both --config FILE and --out DIR, as in: python -m evit_jax.compare '
                         '--config configs/compare_digits.py --out runs/compare')
    folders = [pathlib.Path(folder).expanduser() for folder in (_OUT.value, _DOCS.value) if folder]
    for folder in folders:
        report.check_writable('--out', folder / 'compare.md')
    with distributed.distributed(collective_errors=Preempted):
        rows = compare(_CONFIG.value, folders[0])
    for folder in folders:
        write(rows, [claim.to_dict() for claim in _CONFIG.value.orderings], folder)
    print((folders[-1] / 'compare.md').read_text())


def write(rows: list[dict], expected: list[dict], folder: pathlib.Path) -> None:
    """Writes compare.md, compare.png and compare.json."""
    found, where = verdict.scores(rows), report.machine()
    tables = [report.markdown_table(*verdict.table(found, setting)) for setting in verdict.settings(found)]
    said = [f'- {line}' for line in verdict.orderings(found, expected)]
    head = f'Top-1 in %, {where["date"][:10]}, {where["processor"]}, {where["cpus"]} threads, jax ' \
           f'{where["versions"]["jax"]}. With several seeds: mean and standard deviation.'
    parts = ['# Methods of dropping tokens, compared', head, '![top-1 against cost](compare.png)', *tables,
             *(['## The orderings of the EViT paper', '\n'.join(said)] if said else [])]
    (folder / 'compare.md').write_text('\n\n'.join(parts) + '\n')
    report.write_json(folder / 'compare.json', {'rows': rows})
    panels = {verdict.title(setting): [Point(score.method, score.macs, score.mean, score.spread) for score in found
                                       if score.setting == setting and score.method != DENSE]
              for setting in verdict.settings(found)}
    dense = {verdict.title(score.setting): score.mean for score in found if score.method == DENSE}
    comparison_plot(panels, dense, folder / 'compare.png')


if __name__ == '__main__':
    cli.run(main)
