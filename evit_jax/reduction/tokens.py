"""The tokens of a batch: their activations and the patches that they represent."""

import flax.struct
import jax.numpy as jnp
from jax import Array


@flax.struct.dataclass
class Tokens:
    """Prefix tokens (class, distillation) followed by N patch tokens. Optional fields are not tracked when None.

    Static fields are part of the tree structure; `replace` returns a changed copy.
    """

    x: Array                             # [B, F + N, D]: the F prefix tokens are never dropped
    patch_ids: Array                     # [B, N] int32: row-major patch index; -1 - s is the token fused at reduction s
    token_of_patch: Array | None = None  # [B, P] int32: index of the token that contains each patch; -1: dropped
    size: Array | None = None            # [B, N] float32: number of patches in each token
    mask: Array | None = None            # [B, N] float32: 1 kept, 0 masked (instead of dropped)
    scores: Array | None = None          # [B, N] float32: scores of these tokens in the previous reduction
    stage: int = flax.struct.field(pytree_node=False, default=0)          # number of reductions so far
    gather_impl: str = flax.struct.field(pytree_node=False, default='')   # see `gather.get_gather`
    train: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def num_prefix_tokens(self) -> int:
        """The number of prefix tokens, F."""
        return self.x.shape[1] - self.patch_ids.shape[1]

    @property
    def patches(self) -> Array:
        """The activations of the patch tokens, [B, N, D]."""
        return self.x[:, self.num_prefix_tokens:]

    @property
    def prefix(self) -> Array:
        """The activations of the prefix tokens, [B, F, D]."""
        return self.x[:, :self.num_prefix_tokens]

    def add(self, branch: Array) -> 'Tokens':
        """Adds the output of a residual branch [B, Q, D] to the first Q tokens. Drops the other activations."""
        return self.replace(x=self.x[:, :branch.shape[1]] + branch)

    def first(self, count: int | None) -> 'Tokens':
        """Keeps only the activations of the first `count` tokens; None keeps all."""
        return self if count is None else self.replace(x=self.x[:, :count])


def remap(token_of_patch: Array | None, new_index: Array) -> Array | None:
    """Updates `token_of_patch` after the tokens were reordered, merged or dropped.

    Args:
      token_of_patch: [B, P] int32, old index of the token that contains each patch; -1: dropped.
      new_index: [B, N] int32, the new index of each token; -1: dropped.
    """
    if token_of_patch is None:
        return None
    after = jnp.take_along_axis(new_index, jnp.maximum(token_of_patch, 0), axis=1)
    return jnp.where(token_of_patch < 0, -1, after)
