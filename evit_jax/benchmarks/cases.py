"""What is measured of the models: every combination of what the lists name."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from evit_jax import models
from evit_jax.models.shape import ViTShape
from evit_jax.tokens import reducers
from evit_jax.tokens.keeping import Keeping
from evit_jax.tokens.plan import TokenPlan
from evit_jax.tokens.planned import Planned
from evit_jax.tokens.reducers import EVIT, Reducer

DTYPES = 'float32', 'bfloat16'


class Case(NamedTuple):
    """One combination."""

    model: str
    rate: float
    fused: bool       # False where nothing is dropped
    size: int         # of the image; the model is one made for it
    batch: int
    dtype: str        # of the computation
    reduce_at: tuple[int, ...]
    train: bool = False  # the training step, in place of the forward pass
    reducer: Reducer = EVIT
    r: int = 0           # tokens that every block merges, in place of the rate
    tokens: tuple[int, ...] = ()  # kept at each reduction, in place of the rate
    lowering: str = ''   # how reductions move tokens; '': as is best where it runs

    @property
    def shape(self) -> ViTShape:
        return dataclasses.replace(models.named_shape(self.model), image_size=self.size,
                                   predictors=len(self.reduce_at) if self.reducer.predicts else 0)

    @property
    def plan(self) -> TokenPlan:
        shape, rates = self.shape, (self.rate,) * len(self.reduce_at)
        keeping = Keeping(self.reducer, self.reduce_at, self.fused, rates, self.tokens, self.r)
        return keeping.plans(shape.patches(self.size), shape.depth, shape.macs)(1.0)

    @property
    def macs(self) -> int:
        """Of one image, forward, as the papers count them."""
        return self.shape.macs(self.plan.in_training() if self.train else self.plan)

    @property
    def executed_macs(self) -> int:
        """Of one image's logits, as the model computes them."""
        return self.shape.executed_macs(self.plan)

    @property
    def dense(self) -> 'Case':
        """The same without dropping."""
        return self._replace(rate=1.0, fused=False, reducer=EVIT, reduce_at=(), r=0, tokens=(), lowering='')

    def __str__(self) -> str:
        how = 'merged' if self.reducer.merges else 'fused' if self.fused else 'not fused'
        asked = f'{"-".join(map(str, self.tokens))} at {self.reduce_at}' if self.tokens else f'{self.rate:g}'
        kept = f'{f"r={self.r}" if self.r else asked} {how}' if self.plan.reductions else 'dense'
        kept += '' if self.reducer == EVIT else f', {self.reducer}'
        kept += f' by {self.lowering}' if self.lowering else ''
        step = ', train' if self.train else ''
        return f'{self.model} {kept}, {self.size} px, batch {self.batch}, {self.dtype}{step}'


def choices(flag: str, words: Sequence[str], known: dict[str, Any]) -> list[Any]:
    """What the words of a flag stand for.

    Raises:
      ValueError: one is unknown.
    """
    for word in words:
        if word not in known:
            raise ValueError(f'{flag}={",".join(words)}: {word!r} is unknown, there are {", ".join(known)}')
    return [known[word] for word in words]


def combine(*, names: Sequence[str], rates: Sequence[float], fuse: Sequence[bool], sizes: Sequence[int],
            batches: Sequence[int], dtypes: Sequence[str], reduce_at: Sequence[int] = (),
            train: bool = False, methods: Sequence[str] = ('evit',), merged: Sequence[int] = (),
            planned: Sequence[Planned] = (), lowerings: Sequence[str] = ('',)) -> list[Case]:
    """Every combination once: where nothing is dropped, nothing is fused either, and every method is the same.

    Args:
      names: of models.
      sizes: of images; each model's own, if there are none.
      reduce_at: blocks that drop tokens; at a quarter, half and three quarters of each model, if there are none.
      train: each one's training step too.
      methods: names of reducers; one that cannot fuse does not.
      merged: tokens that every block merges, beside the rates; of the reducers that merge.
      planned: plans that are measured beside the rates, each by every method.
      lowerings: ways to move what is kept, of the reducers that keep by rank; '': the platform's.

    Raises:
      ValueError: an empty list, or a value that cannot be.
    """
    lists = {'models': names, 'reducers': methods, 'rates': rates, 'fuse': fuse, 'batches': batches, 'dtypes': dtypes}
    if empty := [flag for flag, values in lists.items() if not values]:
        raise ValueError(f'--{empty[0]} is empty: give at least one')
    if low := [batch for batch in batches if batch < 1]:
        raise ValueError(f'--batches={",".join(map(str, batches))}: a batch of {low[0]} has no image, give 1 or more')
    reducing = [reducers.named(method) for method in methods]
    if merged and not any(reducer.merges for reducer in reducing):
        raise ValueError(f'--r={",".join(map(str, merged))} is of reducers that merge, and of '
                         f'--reducers={",".join(methods)} none does: add tome or pool, or leave --r out')
    ways = [(rate, 0, reducer) for rate, reducer in itertools.product(rates, reducing)]
    ways += [(1.0, r, reducer) for r, reducer in itertools.product(merged, reducing) if reducer.merges]
    found = {}
    for name in names:
        shape = models.named_shape(name)
        at = tuple(reduce_at) or shape.quarters
        for step, size, batch, dtype, (rate, r, reducer), fused in itertools.product(
                (False, True)[:1 + train], sizes or [shape.image_size], batches, dtypes, ways, fuse):
            case = Case(name, rate, fused and reducer.fuses, size, batch, dtype, at, step, reducer, r)
            found |= _moved(case, lowerings)
    for one, size, step, batch, dtype, reducer in itertools.product(
            planned, sizes or [None], (False, True)[:1 + train], batches, dtypes, reducing):
        found |= _moved(_planned_case(one, names, size, batch, dtype, step, reducer), lowerings)
    return list(found)


def _moved(case, lowerings):
    """The case by each lowering, as keys; once, where nothing is dropped or it is merged."""
    if not case.plan.reductions:
        return {case.dense: None}
    return {case._replace(lowering='' if case.reducer.merges else lowering): None for lowering in lowerings}


def _planned_case(planned, names, size, batch, dtype, step, reducer):
    name = planned.model if planned.model in names else names[0]
    shape = models.named_shape(name)
    size = size or shape.image_size
    planned.check(name, shape.patches(size), shape.depth)
    return Case(name, 1.0, planned.fuse and reducer.fuses, size, batch, dtype, planned.reduce_at, step, reducer,
                tokens=planned.tokens)
