"""The cells of a comparison. There is one cell for each setting, method, cost and seed."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

FEATURES = ('knn', 'probe')          # settings that classify the features of the weights before any training
TRAINED = ('finetuned', 'scratch')   # settings that train a model for each cell
SETTINGS = (*FEATURES, 'untrained', *TRAINED)
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
        seed = f', seed {self.seed}' if self.setting in TRAINED else ''
        return f'{self.setting}, {self.method}{share}{seed}'


def cells_of(config: Any) -> list[Cell]:
    """Returns all cells of a comparison. Cells that need no training come first.

    Raises:
      ValueError: a method has no definition, a share is out of range, or a list is empty.
    """
    cells = []
    for setting in SETTINGS:
        part = config.get(setting)
        if not part:
            continue
        _check_part(config, setting, part)
        seeds = config.seeds if setting in TRAINED else config.seeds[:1]  # evaluation uses no random numbers
        for seed in seeds:
            if part.methods:
                cells.append(Cell(setting, DENSE, 1.0, seed))
            cells += [Cell(setting, name, share, seed) for name in part.methods
                      for share in _shares(config, part, name)]
    if not cells or not config.seeds:
        raise ValueError('the comparison has no cells: give config.seeds, and methods in at least one of '
                         f'{", ".join(f"config.{setting}" for setting in SETTINGS)}')
    return cells


def _shares(config, part, method):
    """Returns the shares of a method in a setting: its own in `config.shares_of`, or those of the setting."""
    return tuple(config.get('shares_of', {}).get(method, part.shares))


def _check_part(config, setting, part):
    if unknown := [name for name in part.methods if name not in config.methods]:
        raise ValueError(f'config.{setting}.methods names {unknown[0]!r}, and config.methods has '
                         f'{", ".join(config.methods)}')
    for name in part.methods:
        shares = _shares(config, part, name)
        if not shares:
            raise ValueError(f'config.{setting} has methods and no shares: give at least one share, or no methods')
        if wrong := [share for share in shares if not 0 < share < 1]:
            raise ValueError(f'config.{setting}.shares={shares}: {wrong[0]} is outside (0, 1). A share is a fraction '
                             'of the MACs of the dense model, which is always included')


def config_of(config: Any, cell: Cell, dense: str, resolved: Mapping[str, Any] | None = None) -> Any:
    """Returns the config of a cell's run. The values of a method replace those of the setting.

    Args:
      dense: workdir of the trained dense model.
      resolved: values of the run that its initial weights determine, by dotted key; see `initial_model.resolve`.
    """
    run = config.run.copy_and_resolve_references()
    method = {} if cell.method == DENSE else config.methods[cell.method].to_dict()
    with run.unlocked():
        run.update_from_flattened_dict(dict(resolved or {}))
        for values in (config[cell.setting].run.to_dict(), method):
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
        run.update(config.get('dense_run', {}))
        run.keep.update(rate=1.0, rates=(), tokens=(), macs=0.0)
    return run
