"""What a comparison says: means and spreads over the seeds, and whether the paper's orderings hold."""

import collections
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from evit_jax.comparison.cells import DENSE, SETTINGS

_SETTINGS = {'untrained': 'without training', 'finetuned': 'fine-tuned', 'scratch': 'from scratch'}


class Score(NamedTuple):
    """Of one method at one cost, over the seeds; shares of 1."""

    setting: str
    method: str
    share: float               # of the MACs of the dense model, asked for
    macs: float                # and had
    top1: tuple[float, ...]    # of each seed
    images: int                # that each was evaluated on

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else 0.0

    @property
    def error(self) -> float:
        """Standard error of one evaluation, from the choice of its images."""
        return math.sqrt(self.mean * (1 - self.mean) / self.images)


def scores(rows: Sequence[dict[str, Any]]) -> list[Score]:
    """The rows of `compare`, seeds together, in the order of the rows."""
    found = collections.defaultdict(list)
    for row in rows:
        found[row['setting'], row['method'], row['share']].append(row)
    return [Score(*key, of[0]['macs'] / of[0]['macs_dense'], tuple(row['top1'] for row in of), of[0]['images'])
            for key, of in found.items()]


def table(found: Sequence[Score], setting: str) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of one setting: a line for each method, a column for each cost."""
    here = {(score.method, score.share): score for score in found if score.setting == setting}
    shares = sorted({share for _, share in here} - {1.0}, reverse=True)
    lines = [[method, *(_cell(here.get((method, share))) for share in shares)]
             for method in dict.fromkeys(method for method, _ in here) if method != DENSE]
    if dense := here.get((DENSE, 1.0)):
        lines.insert(0, [f'{DENSE}: {_cell(dense)}', *[''] * len(shares)])
    return [_SETTINGS[setting], *(f'{100 * share:g} % of MACs' for share in shares)], lines


def orderings(found: Sequence[Score], expected: Sequence[dict[str, str]]) -> list[str]:
    """A sentence for each ordering that the paper has: whether it holds here, at each cost.

    An ordering holds where it does so for every seed, taken in pairs; it is open where the seeds disagree. A pair alone
    tells it if it differs by more than twice the standard error of its two evaluations.

    Args:
      expected: better, worse (methods), setting and, if it is another, the setting of the worse.
    """
    known = {(score.setting, score.method, score.share): score for score in found}
    said = []
    for claim in expected:
        better, worse = claim['better'], claim['worse']
        here, there = claim['setting'], claim.get('worse_setting', claim['setting'])
        for share in sorted({share for setting, method, share in known if (setting, method) == (here, better)},
                            reverse=True):
            if (there, worse, share) not in known:
                continue
            high, low = known[here, better, share], known[there, worse, share]
            pairs = _differences(high.top1, low.top1)
            least = 2 * math.hypot(high.error, low.error) if len(pairs) == 1 else 0
            holds = 'holds' if min(pairs) > least else 'does not hold' if max(pairs) <= -least else 'is open'
            said.append(f'{better} {_SETTINGS[here]} over {worse} {_SETTINGS[there]} at {100 * share:g} % of the MACs: '
                        f'{holds} ({100 * statistics.fmean(pairs):+.1f} points; '
                        f'{", ".join(f"{100 * pair:+.1f}" for pair in pairs)})')
    return said


def _differences(high: Sequence[float], low: Sequence[float]) -> list[float]:
    """The differences seed by seed; one evaluation (without training) stands beside every seed of the other.

    Raises:
      ValueError: the two have other numbers of seeds, so that none belongs to another.
    """
    seeds = max(len(high), len(low))
    high, low = (values * seeds if len(values) == 1 else values for values in (tuple(high), tuple(low)))
    if len(high) != len(low):
        raise ValueError(f'{len(high)} seeds cannot be paired with {len(low)}: run the comparison again, which makes '
                         'the missing ones')
    return [a - b for a, b in zip(high, low, strict=True)]


def settings(found: Sequence[Score]) -> list[str]:
    """Those that have scores, in order."""
    there = {score.setting for score in found}
    return [setting for setting in SETTINGS if setting in there]


def title(setting: str) -> str:
    return _SETTINGS[setting]


def _cell(score):
    if score is None:
        return '-'
    spread = f' ± {100 * score.spread:.1f}' if len(score.top1) > 1 else ''
    return f'{100 * score.mean:.1f}{spread}'
