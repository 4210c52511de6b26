"""What a comparison consists of: every method at every cost, without training, fine-tuned and from scratch."""

import re
from typing import Any, NamedTuple

SETTINGS = ('untrained', 'finetuned', 'scratch')
DENSE = 'dense'  # the method that drops nothing


class Cell(NamedTuple):
    """One result to be had."""

    setting: str  # one of SETTINGS
    method: str
    share: float  # of the dense model's multiply-accumulates
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        method = re.sub(r'\W+', '_', self.method).lower()
        return f'{self.setting}-{method}-{self.share:g}-{self.seed}'

    def __str__(self) -> str:
        share = '' if self.method == DENSE else f' at {100 * self.share:g} % of the MACs'
        seed = '' if self.setting == 'untrained' else f', seed {self.seed}'
        return f'{self.setting}, {self.method}{share}{seed}'


def cells_of(config: Any) -> list[Cell]:
    """All cells of a comparison, the quick ones first.

    Raises:
      ValueError: a method without a definition, a share out of range, a list that is empty.
    """
    found = []
    for setting in SETTINGS:
        part = config[setting]
        if unknown := [name for name in part.methods if name not in config.methods]:
            raise ValueError(f'config.{setting}.methods names {unknown[0]!r}, and config.methods has '
                             f'{", ".join(config.methods)}')
        if wrong := [share for share in part.shares if not 0 < share < 1]:
            raise ValueError(f'config.{setting}.shares={tuple(part.shares)}: {wrong[0]} is outside (0, 1), a share of '
                             'the MACs of the dense model, which is there without being asked for')
        if part.methods and not part.shares:
            raise ValueError(f'config.{setting} has methods and no shares: give at least one, or no methods')
        seeds = config.seeds if setting != 'untrained' else config.seeds[:1]  # nothing is drawn there
        for seed in seeds:
            if part.methods:
                found.append(Cell(setting, DENSE, 1.0, seed))
            found += [Cell(setting, name, share, seed) for name in part.methods for share in part.shares]
    if not found or not config.seeds:
        raise ValueError('the comparison has no cells: give config.seeds, and methods in at least one of '
                         f'{", ".join(f"config.{setting}" for setting in SETTINGS)}')
    return found


def config_of(config: Any, cell: Cell, dense: str) -> Any:
    """The config of a cell's run.

    Args:
      dense: workdir of the trained dense model.
    """
    run = config.run.copy_and_resolve_references()
    method = {} if cell.method == DENSE else config.methods[cell.method].to_dict()
    with run.unlocked():
        for values in (method, config[cell.setting].run.to_dict()):
            run.update(values)
        run.seed = cell.seed
        run.keep.update(rate=1.0, rates=(), tokens=(), macs=0.0 if cell.method == DENSE else cell.share)
        if cell.setting == 'finetuned':
            run.init_from = dense
    return run


def dense_config(config: Any) -> Any:
    """The config of the dense model that is fine-tuned, and used as it is."""
    run = config.run.copy_and_resolve_references()
    with run.unlocked():
        run.keep.update(rate=1.0, rates=(), tokens=(), macs=0.0)
    return run
