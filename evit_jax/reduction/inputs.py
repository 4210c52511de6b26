"""The inputs of token reducers besides the tokens: attention, importance, random keys, learned modules."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from evit_jax.kernels.attention import AttentionOutput
from evit_jax.reduction.tokens import Tokens

if TYPE_CHECKING:
    from evit_jax.reduction.plan import TokenPlan

IMPORTANCES = {
    'class': 'attention of the class token to each token, averaged over the heads',
    'mean': 'attention that each token receives, averaged over the patches and heads',
    'pool': "attention of the attention pool's query in the last block; before it, mean",
    'norm': 'L2 norm of each token',
    'shift': 'L2 norm of the change of each token by the attention branch'}


class ModelInputs(NamedTuple):
    """The parts of a model that its reductions read."""

    modules: Sequence[nnx.Module] = ()  # learned modules of the reducer, one per reduction in the order of the blocks
    has_class_token: bool = True        # the first prefix token is a class token
    coordinates: Array | None = None    # [P, 2] float32, rotary coordinates of all patches; None: the model has none
    pool_attention: Callable[[Tokens], Array] | None = None  # tokens -> attention of the attention pool, [B, N] float32
    grid: tuple[int, int] | None = None  # (rows, columns) of the patches in the image; None: unknown


class ReducerInputs:
    """Inputs of a reducer besides the N tokens that enter the reduction. Each property is computed when it is read.

    Attributes:
      rng: [B] random keys, one per image. In evaluation they are functions of the image alone.
      train: True in training, where `rng` may be used for noise.
      fuse: True if the plan fuses the dropped tokens into one.
      drop: number of tokens to drop before others are merged; static. 0 unless the reducer has `can_drop`.
      block: index of the block.
      depth: number of blocks of the model.
      grid: (rows, columns) of the patches in the image; None: unknown.
      stage: number of reductions before this one.
      module: the learned module of this reduction (`Reducer.make_module`), or None.
      previous_scores: [B, N] float32, scores of these tokens in the previous reduction. The score of a fused token is
        the sum of the scores of its members. None: there was no previous reduction, or it had no scores.
      num_prefix_tokens: number of prefix tokens, F.
      has_class_token: True if the first prefix token is a class token.
    """

    def __init__(self, tokens: Tokens, attention: AttentionOutput | None, plan: 'TokenPlan', block: int, rng: Array,
                 model: ModelInputs):
        """Creates the inputs of the reduction at one block of a plan.

        Args:
          tokens: the tokens that enter the reduction.
          attention: output of the attention of the block; None: the reduction is before the block.
        """
        self.rng, self.block, self.depth = rng, block, len(plan.keep)
        self.fuse, self.drop = plan.fused, plan.drop[block] if plan.drop else 0
        self.train, self.stage, self.previous_scores = tokens.train, tokens.stage, tokens.scores
        self.num_prefix_tokens = tokens.num_prefix_tokens
        self.has_class_token, self.grid = model.has_class_token, model.grid
        self.module = model.modules[tokens.stage] if model.modules else None
        self.records: dict[str, Array] = {}
        self._attention, self._tokens = attention, tokens
        self._pool_attention = model.pool_attention if block == self.depth - 1 else None
        self._importance = plan.reducer.importance or ('class' if model.has_class_token else 'mean')

    @functools.cached_property
    def importance(self) -> Array:
        """Importance of each token by the choice of the reducer (IMPORTANCES), [B, N] float32.

        The choices norm and shift are divided by their sum over the tokens.
        """
        if self._importance == 'class':
            return self.class_attention
        if self._importance == 'norm':
            return _shares(self._tokens.patches)
        if self._importance == 'shift':
            return _shares(self._read('importance').out[:, self.num_prefix_tokens:])
        if self._importance == 'pool' and self._pool_attention is not None:
            return self._pool_attention(self._tokens)
        return self.received_attention

    @functools.cached_property
    def class_attention(self) -> Array:
        """Attention of the class token to each token, averaged over the heads, [B, N] float32.

        Raises:
          ValueError: the model has no class token, or the reducer acts before the block.
        """
        self._check_class_token('class_attention')
        return self._read('class_attention').class_attention[:, self.num_prefix_tokens:]

    @functools.cached_property
    def class_attention_per_head(self) -> Array:
        """Attention of the class token to each token, [B, H, N] float32."""
        self._check_class_token('class_attention_per_head')
        return self._read('class_attention_per_head').class_attention_per_head()[:, :, self.num_prefix_tokens:]

    @functools.cached_property
    def received_attention(self) -> Array:
        """Attention that each token receives, averaged over the patches and heads, [B, N] float32."""
        return self._read('received_attention').received_attention()[:, self.num_prefix_tokens:]

    @functools.cached_property
    def keys(self) -> Array:
        """Attention keys of each head, [B, H, N, d]."""
        return self._read('keys').keys()[:, :, self.num_prefix_tokens:]

    @functools.cached_property
    def mean_keys(self) -> Array:
        """Attention keys, averaged over the heads, [B, N, d] float32."""
        return self._read('mean_keys').mean_keys()[:, self.num_prefix_tokens:]

    @functools.cached_property
    def values(self) -> Array:
        """Attention values of each head, [B, H, N, d]."""
        return self._read('values').values()[:, :, self.num_prefix_tokens:]

    @property
    def fuse_weights(self) -> Array | None:
        """Argument `fuse_weights` of `keep_top`: importance if the plan fuses the dropped tokens, else None."""
        return self.importance if self.fuse else None

    def record(self, name: str, array: Array) -> None:
        """Adds an array to the model's intermediates: `name` maps to a tuple with one entry per reduction."""
        self.records[name] = array

    def _check_class_token(self, name):
        if not self.has_class_token:
            raise ValueError(f'inputs.{name} does not exist: the model has no class token. Read inputs.importance or '
                             'inputs.received_attention')

    def _read(self, name):
        if self._attention is None:
            raise ValueError(f'inputs.{name} does not exist before block {self.block}: its attention is computed '
                             'later. Read tokens, or reduce between attention and MLP (before_block=False)')
        return self._attention


def _shares(x):
    norms = jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
    return norms / norms.sum(axis=1, keepdims=True)
