"""The tables of the EViT paper on ImageNet-1k: each row with its published figures, weights and training.

Source: Liang et al., "Not All Patches are What You Need", ICLR 2022, arXiv 2202.07800. DynamicViT's rows: as cited
there.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

from evit_jax import models
from evit_jax.models.config import ViTConfig
from evit_jax.reduction.plan import TokenPlan, make_plan
from evit_jax.reduction.registry import get_reducer
from evit_jax.viz.tradeoff import Result

IMAGES = 1_281_167  # training images of ImageNet-1k
_SHRINK = 10, 100   # start and length of the keep-rate schedule of a training from scratch, in epochs
_SCRATCH, _FINETUNED = 300, 30  # epochs


class PaperRow(NamedTuple):
    """One row of a table. A published figure that the paper does not give is None."""

    table: str
    model: str
    rate: float
    top1: float | None = None
    top5: float | None = None
    speed: int | None = None      # images/s of the paper's GPU
    gmacs: float | None = None
    fuse: bool = True
    size: int = 224
    epochs: int = 0               # epochs of training; 0: none, the reductions are put into the trained dense model
    start: str = ''               # name of the weights that the training starts from; '': random
    reducer: str = 'evit'

    @property
    def name(self) -> str:
        """The name of the row: that of its run, and of its weights in a folder."""
        fuse = '' if self.rate == 1 or self.reducer != 'evit' else '-fused' if self.fuse else '-not-fused'
        reducer = '' if self.reducer == 'evit' else f'-{self.reducer}'
        kind = f'-{self.epochs}-epochs' if self.start else ''
        return f'{self.model}{reducer}-{self.rate:g}{fuse}-{self.size}{kind}'

    @property
    def weights(self) -> str:
        """The name of the weights: those of the dense model if the row needs no training."""
        return self.name if self.epochs else f'{self.model}-1-224'

    @property
    def config(self) -> ViTConfig:
        return dataclasses.replace(models.get_config(self.model), image_size=self.size)

    @property
    def plan(self) -> TokenPlan:
        config = self.config
        return make_plan(config.patches(self.size), config.depth, rate=self.rate, reduce_at=config.default_reduce_at,
                         fuse=self.fuse, reducer=get_reducer(self.reducer))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return self.config.macs(self.plan)

    @property
    def parameters(self) -> int:
        return self.config.parameters(self.plan)

    def command(self, data: str, weights: str) -> str:
        """Returns the training command of the row; '' if it needs no training.

        Args:
          data: folder of ImageNet.
          weights: folder of the weights that the training starts from.
        """
        if not self.epochs:
            return ''
        values = {'data.source': 'folder', 'data.path': data, 'keep.rate': f'{self.rate:g}', 'epochs': self.epochs}
        if self.size != 224:
            values['model.image_size'] = self.size
        if self.reducer == 'evit' and self.rate < 1 and not self.fuse:
            values['model.fuse'] = False
        if self.start:
            values['init_from'] = f'{weights}/{self.start}'
        elif self.reducer == 'dynamicvit':  # without a dense model there is no teacher
            values |= {'init_from': '', 'distill.kind': 'none', 'optimizer.backbone_scale': 1,
                       'optimizer.backbone_from_epoch': 0}
        arguments = ' '.join(f'--config.{key}={value}' for key, value in values.items())
        return (f'python -m evit_jax.main --config configs/{self._recipe}.py --workdir runs/paper/{self.name} '
                f'{arguments}')

    @property
    def _recipe(self):
        if self.reducer == 'dynamicvit':
            return 'dynamicvit_s'
        return f'{self.model}_finetune' if self.start and self.model == 'deit_s' else self.model

    def training_macs(self) -> float:
        """Returns the multiply-accumulates of the training: three forward passes per image and step.

        A training from scratch is dense at first, as in the keep-rate schedule. DynamicViT computes all tokens and, if
        it starts from a dense model, one forward pass of its teacher.
        """
        dense = self.config.macs(make_plan(self.plan.patches, self.config.depth, reduce_at=()))
        if self.reducer == 'dynamicvit':
            passes = 3 * self.config.macs(self.plan.in_training()) + (dense if self.start else 0)
            return passes * IMAGES * self.epochs
        dense_epochs = 0.0 if self.start or self.rate == 1 else _SHRINK[0] + _SHRINK[1] / 2
        return 3 * IMAGES * (dense_epochs * dense + (self.epochs - dense_epochs) * self.macs)


def _rows(table: str, model: str, figures: Iterable[tuple], **values: Any) -> list[PaperRow]:
    """Returns the rows of figures (rate, top1, top5, speed, gmacs)."""
    return [PaperRow(table, model, *row, **values) for row in figures]


_DENSE = 1.0, 79.8, 94.9, 2923, 4.6
TABLES = {
    'training_free': _rows('training_free', 'deit_s', [
        (1.0, 79.8), (0.9, 79.7), (0.8, 79.2), (0.7, 78.5), (0.6, 76.8), (0.5, 73.8)]),
    'deit': _rows('deit', 'deit_s', [
        _DENSE, (0.9, 79.8, 95.0, 3197, 4.0), (0.8, 79.8, 94.9, 3619, 3.5), (0.7, 79.5, 94.8, 4385, 3.0),
        (0.6, 78.9, 94.5, 4722, 2.6), (0.5, 78.5, 94.2, 5408, 2.3)], epochs=_SCRATCH),
    'no_fusion': _rows('no_fusion', 'deit_s', [
        (0.9, 79.9, 94.9, 3201, 4.0), (0.8, 79.7, 94.8, 3772, 3.5), (0.7, 79.4, 94.7, 4249, 3.0),
        (0.6, 79.1, 94.5, 4967, 2.6), (0.5, 78.4, 94.1, 5325, 2.3)], epochs=_SCRATCH, fuse=False),
    'lvvit': _rows('lvvit', 'lvvit_s', [
        (1.0, 83.3, None, 2112, 6.6), (0.7, 83.0, 96.3, 2954, 4.7), (0.5, 82.5, 96.2, 3603, 3.9)], epochs=_SCRATCH),
    'resolution_deit': [PaperRow('resolution_deit', 'deit_s', *row, size=size, epochs=_SCRATCH) for size, row in (
        (256, (0.5, 79.3, 94.7, 3788, 3.1)), (288, (0.5, 80.1, 95.0, 3138, 3.9)), (304, (0.5, 81.0, 95.6, 2905, 4.4)),
        (256, (0.6, 80.0, 95.0, 3524, 3.5)), (288, (0.6, 81.0, 95.4, 2927, 4.5)),
        (272, (0.7, 80.3, 95.3, 2870, 4.6)))],
    'resolution_lvvit': [
        PaperRow('resolution_lvvit', 'lvvit_s', 1.0, 84.4, None, 557, 21.9, size=384, epochs=_FINETUNED,
                 start='lvvit_s-1-224'),
        *(PaperRow('resolution_lvvit', 'lvvit_s', *row, size=size, epochs=_SCRATCH) for size, row in (
            (240, (0.9, 83.6, 96.5, 1956, 6.8)), (256, (0.8, 83.6, 96.6, 1901, 6.9)),
            (256, (0.7, 83.5, 96.5, 2102, 6.2)), (272, (0.7, 83.7, 96.6, 1829, 7.1)),
            (304, (0.5, 83.4, 96.5, 1758, 7.4)))),
        PaperRow('resolution_lvvit', 'lvvit_s', 0.7, 84.7, 97.1, 548, 21.5, size=448, epochs=_FINETUNED,
                 start='lvvit_s-0.7-fused-272')],
    'dynamicvit': [PaperRow('dynamicvit', 'deit_s', rate, top1, None, speed, gmacs, epochs=epochs, start=start,
                            reducer=reducer) for rate, top1, speed, gmacs, epochs, start, reducer in (
        (0.5, 77.5, 5579, 2.2, 30, 'deit_s-1-224', 'dynamicvit'), (0.5, 78.5, 5549, 2.3, 30, 'deit_s-1-224', 'evit'),
        (0.5, 79.1, None, 2.3, 100, 'deit_s-1-224', 'evit'),
        (0.7, 79.3, 4439, 3.0, 30, 'deit_s-1-224', 'dynamicvit'), (0.7, 79.5, 4478, 3.0, 30, 'deit_s-1-224', 'evit'),
        (0.7, 79.8, None, 3.0, 100, 'deit_s-1-224', 'evit'),
        (0.5, 73.1, None, 2.2, 300, '', 'dynamicvit'), (0.5, 78.5, None, 2.3, 300, '', 'evit'),
        (0.7, 77.6, None, 3.0, 300, '', 'dynamicvit'), (0.7, 79.5, None, 3.0, 300, '', 'evit'))]}


def published() -> list[Result]:
    """Returns the results of the paper for trained models at 224 pixels, with fusion, for a plot of accuracy and cost.

    DynamicViT is fine-tuned for 30 epochs. The speed is that of the paper's GPU.
    """
    series = {'EViT-DeiT-S': ('DeiT-S', TABLES['deit']), 'EViT-LV-ViT-S': ('LV-ViT-S', TABLES['lvvit']),
              'DynamicViT-DeiT-S': ('', [row for row in TABLES['dynamicvit']
                                         if row.reducer == 'dynamicvit' and row.epochs == _FINETUNED])}
    return [Result(name, dense if row.rate == 1 else f'{row.rate:g}', row.top1 / 100, round(row.gmacs * 1e9), row.speed)
            for name, (dense, rows) in series.items() for row in rows]
