"""Analyses the recorded tokens and features of a comparison: how methods differ, and if that predicts accuracy."""

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from evit_jax.comparison import recording, similarity
from evit_jax.comparison.cells import DENSE, SETTINGS, Cell
from evit_jax.comparison.recording import Record

FIGURES = {
    'cka': 'linear CKA of the features with those of the dense model',
    'procrustes': 'Procrustes distance of the features to those of the dense model',
    'overlap': 'mean overlap (IoU) of the kept patches with those of the other methods at this share',
    'nmi': 'mean NMI of the groups after the first half of the blocks with those of the other methods at this share',
    'centre': 'rank correlation of the depth at which a patch is removed with its nearness to the centre'}
_NUM_GROUPED = 64  # number of images whose merged groups are compared


class Analysed(NamedTuple):
    """A cell with its accuracy and its record."""

    cell: Cell
    top1: float
    record: Record

    @property
    def label(self) -> str:
        """The method and the share of the MACs in percent."""
        return f'{self.cell.method} {100 * self.cell.share:g}'

    @property
    def hides(self) -> bool:
        """True if some patches are hidden after the last reduction."""
        return bool(len(self.record.groups)) and bool((self.record.groups[-1] < 0).any())

    @property
    def groups(self) -> np.ndarray:
        """The groups of `_NUM_GROUPED` images after the first half of the blocks, at least after one reduction, [N, P].

        Methods that merge in every block may end with a single token, which agrees with nothing.
        """
        first_half = int((self.record.blocks < self.record.depth / 2).sum())
        return self.record.groups[max(first_half, 1) - 1][:_NUM_GROUPED]

    @property
    def merges(self) -> bool:
        """True if some token of `groups` holds several patches."""
        return bool(len(self.record.groups)) and any(
            len(shown := groups[groups >= 0]) > len(set(shown.tolist())) for groups in self.groups)


class Analysis(NamedTuple):
    """The result for one setting. Labels are those of `Analysed.label`."""

    setting: str
    figures: dict[str, dict[str, float]]             # label -> figure of FIGURES or top1 -> value
    overlaps: dict[tuple[str, str], float]           # pair of labels -> overlap of the kept patches
    groups: dict[tuple[str, str], dict[str, float]]  # pair of labels -> see `similarity.group_agreement`
    depths: dict[str, np.ndarray]                    # label -> mean removal depth of each patch, [rows, columns]
    correlations: dict[str, tuple[float, int]]       # figure -> rank correlation with top-1, number of cells
    num_blocks: int                                  # number of blocks of the model


def analyse(folder: pathlib.Path) -> list[Analysis]:
    """Analyses each setting of a comparison whose cells have records. Of several seeds, the first is analysed.

    Args:
      folder: the folder `--out` of the comparison.

    Raises:
      ValueError: no cell has a record.
    """
    similarity.check_requirements('--analyse')
    cells = read_cells(folder)
    settings = [setting for setting in SETTINGS if any(each.cell.setting == setting for each in cells)]
    if not settings:
        raise ValueError(f'{folder} holds no cell with recorded tokens: run the comparison with config.record=256')
    return [analyse_setting(setting, [each for each in cells if each.cell.setting == setting]) for setting in settings]


def read_cells(folder: pathlib.Path) -> list[Analysed]:
    """Reads the cells of the first seed that are listed in compare.json and have a record."""
    try:
        rows = json.loads((folder / 'compare.json').read_text())['rows']
    except OSError as error:
        raise ValueError(f'{folder} holds no compare.json ({error.strerror}): give the folder --out of a finished '
                         'comparison') from error
    seed, cells = min((row['seed'] for row in rows), default=0), []
    for row in rows:
        cell = Cell(*(row[name] for name in Cell._fields))
        if cell.seed == seed and (record := recording.read(folder / cell.name)):
            cells.append(Analysed(cell, row['top1'], record))
    return cells


def analyse_setting(setting: str, cells: Sequence[Analysed]) -> Analysis:
    """Analyses the cells of one setting. Cells with another patch grid than the dense model are left out."""
    dense = next((each for each in cells if each.cell.method == DENSE), None)
    reduced = [each for each in cells if each.cell.method != DENSE and (
        dense is None or (each.record.grid == dense.record.grid).all())]
    overlaps = {(a.label, b.label): similarity.kept_overlap(a.record.groups[-1], b.record.groups[-1])
                for a, b in itertools.combinations([each for each in reduced if each.hides], 2)}
    groups = {(a.label, b.label): similarity.group_agreement(a.groups, b.groups)
              for a, b in itertools.combinations([each for each in reduced if each.merges], 2)}
    depths = {each.label: similarity.removal_depths(each.record) for each in reduced if each.hides}
    nmi = {pair: agreement['nmi'] for pair, agreement in groups.items()}
    figures = {each.label: _figures(each, dense, reduced, overlaps, nmi, depths) for each in reduced}
    return Analysis(setting, figures, overlaps, groups, depths, _correlations(figures), int(cells[0].record.depth))


def _figures(each, dense, reduced, overlaps, nmi, depths):
    figures = {'top1': each.top1}
    if dense is not None:
        figures['cka'] = similarity.linear_cka(each.record.features, dense.record.features)
        figures['procrustes'] = similarity.procrustes_distance(each.record.features, dense.record.features)
    peers = [other.label for other in reduced if other.cell.share == each.cell.share and other is not each]
    for name, pairs in (('overlap', overlaps), ('nmi', nmi)):
        values = [pairs[pair] for peer in peers for pair in ((each.label, peer), (peer, each.label)) if pair in pairs]
        if values:
            figures[name] = float(np.mean(values))
    if each.label in depths:
        figures['centre'] = similarity.centre_correlation(depths[each.label])
    return {name: value for name, value in figures.items() if np.isfinite(value)}


def _correlations(figures: Mapping[str, Mapping[str, float]]) -> dict[str, tuple[float, int]]:
    """Returns the rank correlation of each figure with top-1, and the number of cells; at least four cells."""
    from scipy.stats import spearmanr
    result = {}
    for name in FIGURES:
        pairs = [(values[name], values['top1']) for values in figures.values() if name in values]
        if len(pairs) > 3 and all(len(set(column)) > 1 for column in zip(*pairs)):
            result[name] = float(spearmanr(*zip(*pairs)).statistic), len(pairs)
    return result


def to_json(analyses: Sequence[Analysis]) -> list[dict[str, Any]]:
    """Returns the analyses as JSON types. A pair of labels becomes 'A | B'."""
    def joined(pairs):
        return {' | '.join(pair): value for pair, value in pairs.items()}

    return [analysis._asdict() | {'overlaps': joined(analysis.overlaps), 'groups': joined(analysis.groups),
                                  'depths': {label: depths.tolist() for label, depths in analysis.depths.items()}}
            for analysis in analyses]
