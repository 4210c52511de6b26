"""Summarises a comparison: computes means and standard deviations over seeds, and checks expected orderings."""

import collections
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from evit_jax.comparison.cells import DENSE, SETTINGS

_TITLES = {'knn': 'k-NN, no training', 'probe': 'linear probe', 'untrained': 'without training',
           'finetuned': 'fine-tuned', 'scratch': 'from scratch'}


class Score(NamedTuple):
    """The accuracies of one method in one setting at one cost. Fractions are in [0, 1]."""

    setting: str
    method: str
    share: float               # requested fraction of the dense model's MACs
    macs: float                # actual fraction of the dense model's MACs
    top1: tuple[float, ...]    # one value per seed
    images: int                # number of images evaluated per seed

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else 0.0

    @property
    def error(self) -> float:
        """Standard error of one evaluation. It accounts only for the random choice of the images."""
        return math.sqrt(self.mean * (1 - self.mean) / self.images)


def scores(rows: Sequence[dict[str, Any]]) -> list[Score]:
    """Groups the rows of `compare` by setting, method and share. The order of the rows is preserved."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row['setting'], row['method'], row['share']].append(row)
    return [Score(*key, group[0]['macs'] / group[0]['macs_dense'], tuple(row['top1'] for row in group),
                  group[0]['images']) for key, group in groups.items()]


def table(all_scores: Sequence[Score], setting: str) -> tuple[list[str], list[list[str]]]:
    """Returns the headers and rows of the table for one setting. It has a row per method and a column per cost."""
    by_key = {(score.method, score.share): score for score in all_scores if score.setting == setting}
    shares = sorted({share for _, share in by_key} - {1.0}, reverse=True)
    lines = [[method, *(_format(by_key.get((method, share))) for share in shares)]
             for method in dict.fromkeys(method for method, _ in by_key) if method != DENSE]
    if dense := by_key.get((DENSE, 1.0)):
        lines.insert(0, [f'{DENSE}: {_format(dense)}', *[''] * len(shares)])
    return [_TITLES[setting], *(f'{100 * share:g} % of MACs' for share in shares)], lines


def orderings(all_scores: Sequence[Score], expected: Sequence[dict[str, str]]) -> list[str]:
    """Returns a sentence for each expected ordering and each cost: it is confirmed, contradicted, or undecided.

    The accuracies of the two methods are compared for each seed. An ordering is confirmed if it holds for every seed,
    contradicted if it holds for none, and otherwise undecided. A single pair of accuracies is undecided unless its
    difference exceeds twice the standard error.

    Args:
      expected: dicts with the keys better and worse (methods) and setting; worse_setting if it differs from setting;
        share to compare at one cost instead of all; worse_share if the cost of the worse method differs.
    """
    by_key = {(score.setting, score.method, score.share): score for score in all_scores}
    lines = []
    for ordering in expected:
        better, worse = ordering['better'], ordering['worse']
        setting, worse_setting = ordering['setting'], ordering.get('worse_setting', ordering['setting'])
        shares = {share for *key, share in by_key if key == [setting, better]}
        if 'share' in ordering:
            shares &= {ordering['share']}
        for share in sorted(shares, reverse=True):
            worse_share = ordering.get('worse_share', share)
            if (worse_setting, worse, worse_share) not in by_key:
                continue
            costs = f'at {100 * share:g} % of the MACs'
            if worse_share != share:
                costs += f' and {100 * worse_share:g} %'
            lines.append(f'{better} ({_TITLES[setting]}) is better than {worse} ({_TITLES[worse_setting]}) {costs}: '
                         + _verdict(by_key[setting, better, share], by_key[worse_setting, worse, worse_share]))
    return lines


def _verdict(high: Score, low: Score) -> str:
    """Returns the verdict on an ordering, with the mean difference and that of each seed."""
    differences = _differences(high.top1, low.top1)
    least = 2 * math.hypot(high.error, low.error) if len(differences) == 1 else 0
    verdict = ('confirmed' if min(differences) > least else 'contradicted' if max(differences) <= -least else
               'undecided')
    by_seed = ', '.join(f'{100 * difference:+.1f}' for difference in differences)
    return f'{verdict} ({100 * statistics.fmean(differences):+.1f} points; by seed {by_seed})'


def _differences(high: Sequence[float], low: Sequence[float]) -> list[float]:
    """Returns the difference for each seed. A single value is paired with every seed of the other method.

    Raises:
      ValueError: the numbers of seeds differ, and neither is 1.
    """
    seeds = max(len(high), len(low))
    high, low = (values * seeds if len(values) == 1 else values for values in (tuple(high), tuple(low)))
    if len(high) != len(low):
        raise ValueError(f'{len(high)} seeds cannot be paired with {len(low)}: run the comparison again, which runs '
                         'the missing ones')
    return [a - b for a, b in zip(high, low, strict=True)]


def settings(all_scores: Sequence[Score]) -> list[str]:
    """Returns the settings that have scores, in the order of SETTINGS."""
    present = {score.setting for score in all_scores}
    return [setting for setting in SETTINGS if setting in present]


def title(setting: str) -> str:
    """Returns the title of a setting in tables and plots."""
    return _TITLES[setting]


def _format(score):
    if score is None:
        return '-'
    spread = f' ± {100 * score.spread:.1f}' if len(score.top1) > 1 else ''
    return f'{100 * score.mean:.1f}{spread}'
