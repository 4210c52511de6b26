"""Compares methods of dropping tokens: python -m evit_jax.compare --config configs/compare_digits.py --out runs/compare

All methods get the same data, seeds, number of steps and share of the dense model's multiply-accumulates (MACs). Each
is evaluated in three settings: in a trained dense model without further training, fine-tuned from that model, and
trained from scratch. The folder --out receives a workdir for each run, and finally the report: compare.md, compare.png
and compare.json. After SIGTERM or Ctrl-C the program exits with code 75; run the same command again to continue.

--docs FOLDER also writes the report to another folder.
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

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config of the comparison, such as '
                                          'configs/compare_digits.py.')
_OUT = flags.DEFINE_string('out', None, 'Folder of the runs and of the report.')
_DOCS = flags.DEFINE_string('docs', None, 'A second folder for the report.')


def main() -> None:
    """Runs all unfinished cells, and writes the report."""
    if _CONFIG.value is None or _OUT.value is None:
        raise ValueError('give both --config FILE and --out DIR, as in: python -m evit_jax.compare '
                         '--config configs/compare_digits.py --out runs/compare')
    folders = [pathlib.Path(folder).expanduser() for folder in (_OUT.value, _DOCS.value) if folder]
    for folder in folders:
        report.check_writable('--out', folder / 'compare.md')
    with distributed.distributed(collective_errors=Preempted):
        rows = compare(_CONFIG.value, folders[0])
    for folder in folders:
        write_report(rows, [ordering.to_dict() for ordering in _CONFIG.value.orderings], folder)
    print((folders[-1] / 'compare.md').read_text())


def write_report(rows: list[dict], expected: list[dict], folder: pathlib.Path) -> None:
    """Writes compare.md, compare.png and compare.json.

    Args:
      rows: results of `compare`.
      expected: orderings to check; see `verdict.orderings`.
    """
    scores, machine = verdict.scores(rows), report.machine()
    tables = [report.markdown_table(*verdict.table(scores, setting)) for setting in verdict.settings(scores)]
    orderings = [f'- {line}' for line in verdict.orderings(scores, expected)]
    head = f'Top-1 in %, {machine["date"][:10]}, {machine["processor"]}, {machine["cpus"]} threads, jax ' \
           f'{machine["versions"]["jax"]}. With several seeds: mean and standard deviation.'
    parts = ['# Comparison of token reduction methods', head, '![top-1 against cost](compare.png)', *tables,
             *(['## Orderings in the EViT paper', '\n'.join(orderings)] if orderings else [])]
    (folder / 'compare.md').write_text('\n\n'.join(parts) + '\n')
    report.write_json(folder / 'compare.json', {'rows': rows})
    panels = {verdict.title(setting): [Point(score.method, score.macs, score.mean, score.spread) for score in scores
                                       if score.setting == setting and score.method != DENSE]
              for setting in verdict.settings(scores)}
    dense = {verdict.title(score.setting): score.mean for score in scores if score.method == DENSE}
    comparison_plot(panels, dense, folder / 'compare.png')


if __name__ == '__main__':
    cli.run(main)
