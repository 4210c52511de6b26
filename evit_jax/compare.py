"""Compares methods of dropping tokens: python -m evit_jax.compare --config configs/compare_digits.py --out runs/compare

All methods get the same data, seeds, number of steps and share of the dense model's multiply-accumulates (MACs). A cell
is one method at one share in one of five settings: features of the initial weights, classified by k-NN or by a linear
probe; a trained dense model without further training; fine-tuned from that model; and trained from scratch. The folder
--out receives a folder for each cell, and finally the report: compare.md, compare.png and compare.json.
After SIGTERM or Ctrl-C the program exits with code 75; run the same command again to continue.

--docs FOLDER also writes the report to another folder. --plan SHARE=FILE adds a searched plan to the methods.

python -m evit_jax.compare --analyse runs/compare_real

compares the recorded tokens and features of the cells, and writes analysis.html, analysis.md and analysis.json to the
folder: overlap of kept patches, agreement of merged groups, similarity of features to those of the dense model, the
block at which patches are dropped, and the correlation of these figures with accuracy.
"""

import pathlib
from typing import Any

from absl import flags
from ml_collections import config_flags

from evit_jax import cli
from evit_jax.benchmarks import report
from evit_jax.comparison import analysis, verdict
from evit_jax.comparison.analysis import Analysis
from evit_jax.comparison.cells import DENSE, SETTINGS
from evit_jax.comparison.running import compare
from evit_jax.reduction.plan_file import PlanFile, read_plan_file
from evit_jax.runtime import distributed
from evit_jax.runtime.preemption import Preempted
from evit_jax.viz.analysis_page import AnalysisPart, analysis_page
from evit_jax.viz.comparison import Point, comparison_plot

SEARCHED = 'searched plan'  # method name of the plans that --plan gives

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config of the comparison, such as '
                                          'configs/compare_digits.py.')
_OUT = flags.DEFINE_string('out', None, 'Folder of the runs and of the report.')
_DOCS = flags.DEFINE_string('docs', None, 'A second folder for the report.')
_PLAN = flags.DEFINE_multi_string('plan', [], 'SHARE=FILE: a plan file of evit_jax.plan, and its share of the MACs of '
                                  'the dense model, such as 0.5=plan.json. May be repeated.')
_ANALYSE = flags.DEFINE_string('analyse', None, 'Folder --out of a finished comparison to analyse; nothing is run.')


def main() -> None:
    """Runs all unfinished cells and writes the report; or analyses a finished comparison."""
    if _ANALYSE.value is not None:
        print(write_analysis(pathlib.Path(_ANALYSE.value).expanduser()))
        return
    if _CONFIG.value is None or _OUT.value is None:
        raise ValueError('give both --config FILE and --out DIR, as in: python -m evit_jax.compare '
                         '--config configs/compare_digits.py --out runs/compare')
    folders = [pathlib.Path(folder).expanduser() for folder in (_OUT.value, _DOCS.value) if folder]
    for folder in folders:
        report.check_writable('--out', folder / 'compare.md')
    plans = dict(map(parse_plan, _PLAN.value))
    config = with_plans(_CONFIG.value, plans)
    with distributed.distributed(collective_errors=Preempted):
        rows = compare(config, folders[0], plans=plans)
    for folder in folders:
        write_report(rows, [ordering.to_dict() for ordering in config.orderings], folder)
    print((folders[-1] / 'compare.md').read_text())


def parse_plan(text: str) -> tuple[tuple[str, float], PlanFile]:
    """Returns (method, share) and the plan file of a flag SHARE=FILE.

    Raises:
      ValueError: the share is no number in (0, 1), or the file holds no plan.
    """
    share, _, path = text.partition('=')
    try:
        share = float(share)
    except ValueError:
        share = 0.0
    if not 0 < share < 1 or not path:
        raise ValueError(f'--plan={text} is not SHARE=FILE with a share in (0, 1): give for example 0.5=plan.json')
    return (SEARCHED, share), read_plan_file(path)


def with_plans(config: Any, plans: dict[tuple[str, float], PlanFile]) -> Any:
    """Returns the config of a comparison with the searched plans as one more method of each setting."""
    if not plans:
        return config
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.methods[SEARCHED] = {}
        config.shares_of = config.get('shares_of', {})
        config.shares_of[SEARCHED] = tuple(sorted((share for _, share in plans), reverse=True))
        for setting in SETTINGS:
            if config.get(setting) and config[setting].methods:
                config[setting].methods = (*config[setting].methods, SEARCHED)
    return config


def write_report(rows: list[dict], expected: list[dict], folder: pathlib.Path) -> None:
    """Writes compare.md, compare.png and compare.json.

    Args:
      rows: results of `compare`.
      expected: orderings to check; see `verdict.orderings`.
    """
    scores, machine = verdict.scores(rows), report.machine()
    tables = [f'{report.markdown_table(*verdict.table(scores, setting))}\n\n{_minutes(rows, setting)}'
              for setting in verdict.settings(scores)]
    orderings = [f'- {line}' for line in verdict.orderings(scores, expected)]
    head = f'Top-1 in %, {machine["date"][:10]}, {machine["processor"]}, {machine["cpus"]} threads, jax ' \
           f'{machine["versions"]["jax"]}. With several seeds: mean and standard deviation.'
    parts = ['# Comparison of token reduction methods', head, '![top-1 against cost](compare.png)', *tables,
             *(['## Expected orderings', '\n'.join(orderings)] if orderings else [])]
    (folder / 'compare.md').write_text('\n\n'.join(parts) + '\n')
    report.write_json(folder / 'compare.json', {'rows': rows})
    panels = {verdict.title(setting): [Point(score.method, score.macs, score.mean, score.spread) for score in scores
                                       if score.setting == setting and score.method != DENSE]
              for setting in verdict.settings(scores)}
    dense = {verdict.title(score.setting): score.mean for score in scores if score.method == DENSE}
    comparison_plot(panels, dense, folder / 'compare.png')


def _minutes(rows: list[dict], setting: str) -> str:
    """Returns a sentence with the duration of the cells of a setting."""
    minutes = [row['seconds'] / 60 for row in rows if row['setting'] == setting]
    each = f'{min(minutes):.1f} to {max(minutes):.1f}'
    return f'Cells: {len(minutes)}. Minutes of a cell, since its last start: {each}, in all {sum(minutes):.0f}.'


def write_analysis(folder: pathlib.Path) -> str:
    """Writes analysis.md, analysis.html and analysis.json to the folder of a comparison. Returns the Markdown."""
    analyses = analysis.analyse(folder)
    text = '\n\n'.join(['# Analysis of the comparison', *(
        report.markdown_table(*_figures_table(each)) for each in analyses)]) + '\n'
    (folder / 'analysis.md').write_text(text)
    report.write_json(folder / 'analysis.json', {'settings': analysis.to_json(analyses)})
    names = {'nmi': 'NMI', 'homogeneity': 'Homogeneity', 'completeness': 'Completeness'}
    parts = [AnalysisPart(
        verdict.title(each.setting), each.figures, each.correlations,
        {'Overlap (IoU) of the kept patches': each.overlaps} | {
            f'{title} of the merged groups': {pair: value[name] for pair, value in each.groups.items()}
            for name, title in names.items()}, each.depths, each.num_blocks) for each in analyses]
    (folder / 'analysis.html').write_text(analysis_page(parts, analysis.FIGURES), encoding='utf-8')
    return text


def _figures_table(each: Analysis) -> tuple[list[str], list[list[str]]]:
    names = ['top1', *analysis.FIGURES]
    rows = [[label, *(f'{values[name]:.3f}' if name in values else '-' for name in names)]
            for label, values in each.figures.items()]
    rows.append(['rank correlation with top1', '', *(f'{each.correlations[name][0]:+.2f}' if name in each.correlations
                                                     else '-' for name in analysis.FIGURES)])
    return [verdict.title(each.setting), *names], rows


if __name__ == '__main__':
    cli.run(main)
