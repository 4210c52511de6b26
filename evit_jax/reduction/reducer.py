"""The interface of token reducers. Each token plan has one reducer."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from evit_jax.reduction.inputs import IMPORTANCES, ReducerInputs
from evit_jax.reduction.tokens import Tokens
from evit_jax.runtime.names import get_by_name

PARAMS = 'reducer'  # key of the reducer's learned parameters in the parameter tree; one subtree per reduction


class Reducer:
    """A method that reduces tokens. Subclass it, or decorate a function with `register_reducer`.

    Two reducers are equal if their names and registration numbers are equal. Plans with equal reducers share compiled
    programs. Registering a name again makes a new, different reducer, whose programs are compiled anew.

    Attributes:
      name: value of `config.reducer.name` that selects the reducer.
      registration: number of registrations of this name so far, from 1.
      can_fuse: True if the reducer can fuse the dropped tokens into one extra token.
      can_drop: True if the reducer drops `inputs.drop` tokens before it merges others.
      before_block: True if it reduces before the block, False if between attention and MLP of the block.
      merges: True if it merges tokens. Attention then weights each token by its number of patches.
      every_block: True if it reduces in every block unless blocks are given.
      same_in_all_blocks: True if a reduction depends only on activations, sizes and attention: not on the block, random
        keys, previous scores or learned modules. The plan search then uses one program for all blocks.
      importance: choice of `ReducerInputs.importance`, a key of IMPORTANCES; '': class if the model has a class token,
        else mean. None: the reducer reads no importance.
      has_sized_modules: True if the shapes of the learned parameters depend on the number of kept tokens. Such a model
        runs only under plans with the counts of its training.
      checkpoint_prefix: prefix of the names of the learned parameters in PyTorch checkpoints.
    """

    name = ''
    registration = 1
    can_fuse = False
    can_drop = False
    before_block = False
    merges = False
    every_block = False
    same_in_all_blocks = False
    importance: str | None = None
    has_sized_modules = False
    checkpoint_prefix = PARAMS

    def reduce(self, tokens: Tokens, inputs: ReducerInputs, keep: int) -> Tokens:
        """Reduces N tokens to `keep`, or to `keep + 1` if `inputs.fuse`. `keep` is static."""
        raise NotImplementedError(f'{type(self).__name__} defines no reduce(tokens, inputs, keep)')

    def num_kept(self, patches: int, entering: int, rates: Sequence[float]) -> int:
        """Returns the number of tokens that a keep rate keeps.

        Args:
          patches: number of patches of the image.
          entering: number of tokens that enter the reduction.
          rates: keep rates of the reductions up to this one, in order.
        """
        return ceil_rate(patches, entering, rates)

    def min_kept(self, entering: int) -> int:
        """Returns the smallest number of entering tokens that a reduction can keep."""
        return 1

    def num_leaving(self, entering: int, keep: int, fuse: bool) -> int:
        """Returns the number of tokens that leave a reduction."""
        return keep + fuse

    def prepare(self, tokens: Tokens) -> Tokens:
        """Prepares the tokens that enter the first block, for example to track their sizes."""
        if not self.merges:
            return tokens
        return tokens.replace(size=jnp.ones(tokens.patch_ids.shape, jnp.float32))

    def make_module(self, width: int, *, keep: int, init_std: float, dtype: Any, rngs: nnx.Rngs) -> nnx.Module | None:
        """Makes the learned module of one reduction, for tokens of `width` channels. None: the reducer learns nothing.

        Args:
          keep: number of tokens that the reduction keeps; 0 unless `has_sized_modules`.
          init_std: standard deviation of the model's initial weights.
          dtype: dtype of the computation.
        """
        return None

    def module_macs(self, tokens: int, width: int, keep: int) -> int:
        """Returns the number of multiply-accumulates of the learned module for one image.

        Args:
          tokens: number of tokens that enter the reduction.
          keep: number of tokens that leave it.
        """
        return 0

    def with_importance(self, importance: str) -> 'Reducer':
        """Returns this reducer with another importance. Its name is NAME:IMPORTANCE.

        Raises:
          ValueError: unknown importance, or the reducer reads none.
        """
        if self.importance is None:
            raise ValueError(f'reducer {self.name} reads no importance: {self.name}:{importance} means nothing, give '
                             f'{self.name}')
        get_by_name('importance', importance, IMPORTANCES)
        reducer = copy.copy(self)
        reducer.name, reducer.importance = f'{self.name.partition(":")[0]}:{importance}', importance
        return reducer

    def in_training(self) -> 'Reducer':
        """Returns the training variant of this reducer; by default the reducer itself."""
        return self

    @property
    def is_learned(self) -> bool:
        """True if the reducer has learned modules."""
        return type(self).make_module is not Reducer.make_module

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reducer) and (self.name, self.registration) == (other.name, other.registration)

    def __hash__(self) -> int:
        return hash((self.name, self.registration))

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f'<reducer {self.name!r}>'


class FunctionReducer(Reducer):
    """A reducer that calls a function `reduce(tokens, inputs, keep)`; see `register_reducer`."""

    def __init__(self, reduce: Callable[[Tokens, ReducerInputs, int], Tokens], **attributes: Any):
        self.reduce = reduce
        self.__dict__ |= attributes


class LearnedFunctionReducer(FunctionReducer):
    """A `FunctionReducer` with a learned module, passed to the function as `inputs.module`."""

    module: Callable[[int, nnx.Rngs], nnx.Module]

    def make_module(self, width: int, *, keep: int, init_std: float, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
        return self.module(width, rngs)


def ceil_rate(patches: int, entering: int, rates: Sequence[float]) -> int:
    """EViT's count: rate times the number of entering tokens (a fused token included), rounded up."""
    return math.ceil(rates[-1] * entering)


def floor_rate(patches: int, entering: int, rates: Sequence[float]) -> int:
    """DynamicViT's count: product of the rates so far times the number of patches, rounded down; at least 1."""
    return min(max(int(patches * math.prod(rates)), 1), entering)


class Modules(NamedTuple):
    """The learned modules of a model: their reducer, and one module per reduction in ascending order of the blocks."""

    reducer: Reducer | None = None
    count: int = 0
    blocks: tuple[int, ...] = ()  # blocks at which the modules were trained; (): unknown
    tokens: tuple[int, ...] = ()  # number of tokens that each reduction keeps; () unless `has_sized_modules`

    def make(self, width: int, **options: Any) -> list[nnx.Module]:
        """Makes the modules.

        Args:
          options: keyword arguments of `Reducer.make_module`, without `keep`.
        """
        return [self.reducer.make_module(width, keep=keep, **options) for keep in self.tokens or (0,) * self.count]

    def check(self, plan: Any) -> None:
        """Checks that the model has a learned module for each reduction of a plan, trained at the same block.

        A module of a reducer with `has_sized_modules` must also have been trained with the same number of kept tokens.

        Args:
          plan: a `TokenPlan`.

        Raises:
          ValueError: a module is missing, or was trained at another block or with another number of tokens.
        """
        reducer, needed = plan.reducer, len(plan.reductions)
        if not reducer.is_learned or not needed:
            return
        own = self.reducer is not None and (self.reducer == reducer or self.reducer.in_training() == reducer)
        if not own or needed > self.count:
            has = f'{self.count} learned module{"s" * (self.count != 1)}' if own else 'none of its modules'
            raise ValueError(
                f'reducer {reducer} needs a learned module for each of the blocks {plan.reductions}, and this model '
                f'has {has}: train one with config.reducer.name={reducer.name} and as many blocks in '
                'config.model.reduce_at, or choose another reducer' + ' or fewer reductions' * own)
        for block, trained_at in zip(plan.reductions, self.blocks):
            if block != trained_at:
                raise ValueError(
                    f'{reducer} would use the module trained at block {trained_at} at block {block}: its modules were '
                    f'trained at the blocks {self.blocks}, and the plan reduces at {plan.reductions}: keep the trained '
                    'blocks, or choose another reducer')
        if reducer.has_sized_modules and plan.tokens != self.tokens[:needed]:
            raise ValueError(
                f'{reducer} has learned parameters for each token that it keeps: its modules were trained to keep '
                f'{self.tokens} tokens, and the plan keeps {plan.tokens}: keep the trained counts, or choose another '
                'reducer')


NO_MODULES = Modules()


def modules_at(reducer: Reducer, blocks: Iterable[int], tokens: Sequence[int] = ()) -> Modules:
    """Returns the learned modules of a model that is trained to reduce at given blocks, in any order.

    Args:
      tokens: number of tokens that each reduction keeps, in ascending order of the blocks. Only needed if the reducer
        has `has_sized_modules`; such a reducer has no modules without it.
    """
    blocks = tuple(sorted(blocks))
    return _modules(reducer, len(blocks), blocks, tokens)


def modules_of(reducer: Reducer, names: Iterable[str], prefix: str = PARAMS, blocks: Iterable[int] = (),
               tokens: Sequence[int] = ()) -> Modules:
    """Returns the learned modules of a reducer in a model, found by the dotted names of the parameters.

    Args:
      blocks: blocks at which they were trained, in any order; (): unknown.
      tokens: see `modules_at`.
    """
    count = len({name.split('.')[1] for name in names if name.startswith(f'{prefix}.')})
    return _modules(reducer, count, tuple(sorted(blocks)), tokens)


def _modules(reducer, count, blocks, tokens):
    if not reducer.is_learned or not count:
        return NO_MODULES
    if not reducer.has_sized_modules:
        return Modules(reducer, count, blocks)
    return Modules(reducer, count, blocks, tuple(tokens)) if len(tokens) == count else NO_MODULES
