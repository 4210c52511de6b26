"""The cells of a comparison. There is one cell for each setting, method, cost and seed."""

import re
from typing import Any, NamedTuple

SETTINGS = ('untrained', 'finetuned', 'scratch')
DENSE = 'dense'  # method name of the model that keeps all tokens


class Cell(NamedTuple):
    """One run or evaluation of a comparison."""

    setting: str  # one of SETTINGS
    method: str
    share: float  # fraction of the dense model's multiply-accumulates (MACs)
    seed: int

    @property
    def name(self) -> str:
        """Name of the cell's folder."""
        method = re.sub(r'\W+', '_', self.method).lower()
        return f'{self.setting}-{method}-{self.share:g}-{self.seed}'

    def __str__(self) -> str:
        share = '' if self.method == DENSE else f' at {100 * self.share:g} % of the MACs'
        seed = '' if self.setting == 'untrained' else f', seed {self.seed}'
        return f'{self.setting}, {self.method}{share}{seed}'


def cells_of(config: Any) -> list[Cell]:
    """Returns all cells of a comparison. Cells that need no training come first.

    Raises:
      ValueError: a method has no definition, a share is out of range, or a list is empty.
    """
    cells = []
    for setting in SETTINGS:
        part = config[setting]
        if unknown := [name for name in part.methods if name not in config.methods]:
            raise ValueError(f'config.{setting}.methods names {unknown[0]!r}, and config.methods has '
                             f'{", ".join(config.methods)}')
        if wrong := [share for share in part.shares if not 0 < share < 1]:
            raise ValueError(f'config.{setting}.shares={tuple(part.shares)}: {wrong[0]} is outside (0, 1). A share is '
                             'a fraction of the MACs of the dense model, which is always included')
        if part.methods and not part.shares:
            raise ValueError(f'config.{setting} has methods and no shares: give at least one share, or no methods')
        seeds = config.seeds if setting != 'untrained' else config.seeds[:1]  # evaluation uses no random numbers
        for seed in seeds:
            if part.methods:
                cells.append(Cell(setting, DENSE, 1.0, seed))
            cells += [Cell(setting, name, share, seed) for name in part.methods for share in part.shares]
    if not cells or not config.seeds:
        raise ValueError('the comparison has no cells: give config.seeds, and methods in at least one of '
                         f'{", ".join(f"config.{setting}" for setting in SETTINGS)}')
    return cells


def config_of(config: Any, cell: Cell, dense: str) -> Any:
    """Returns the config of a cell's run.

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
    """Returns the config of the dense model. It is the start of the settings 'untrained' and 'finetuned'."""
    run = config.run.copy_and_resolve_references()
    with run.unlocked():
        run.keep.update(rate=1.0, rates=(), tokens=(), macs=0.0)
    return run
