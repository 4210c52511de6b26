"""The tokens of a batch: their activations and the patches that they represent."""

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array


@flax.struct.dataclass
class Tokens:
    """Prefix tokens (class, distillation, registers) followed by N patch tokens. A field that is None is not tracked.

    Static fields are part of the tree structure; `replace` returns a changed copy.
    """

    x: Array                             # [B, F + N, D]: the F prefix tokens are never dropped
    patch_ids: Array                     # [B, N] int32: row-major patch index; -1 - s is the token fused at reduction s
    token_of_patch: Array | None = None  # [B, P] int32: index of the token that contains each patch; -1: dropped
    size: Array | None = None            # [B, N] float32: number of patches in each token
    mask: Array | None = None            # [B, N] float32: 1 kept, 0 masked (instead of dropped)
    scores: Array | None = None          # [B, N] float32: scores of these tokens in the previous reduction
    coordinates: Array | None = None     # [B or 1, N, 2] float32: rotary coordinates (row, column); see kernels.rope
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

    @property
    def sizes(self) -> Array:
        """The number of patches in each token, [B, N] float32. They are counted if `size` is not tracked."""
        if self.size is not None:
            return self.size
        if self.token_of_patch is None:
            return jnp.ones(self.patch_ids.shape, jnp.float32)
        return sum_over_patches(self.token_of_patch, jnp.ones(self.token_of_patch.shape, jnp.float32),
                                self.patch_ids.shape[1])

    @property
    def weights(self) -> Array:
        """The weight of each token in a mean over the patches, [B, N] float32: its size, or 0 if it is masked."""
        if self.mask is None:
            return self.sizes
        return self.mask if self.size is None else self.mask * self.size

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


def sum_over_patches(token_of_patch: Array, values: Array, num_tokens: int) -> Array:
    """Sums values over the patches in each token.

    Args:
      token_of_patch: [B, P] int32, index of the token that contains each patch; -1: dropped.
      values: [B or 1, P, ...].

    Returns:
      [B, num_tokens, ...].
    """
    def one_image(index, values):
        zeros = jnp.zeros((num_tokens + 1, *values.shape[1:]), values.dtype)
        return zeros.at[jnp.where(index < 0, num_tokens, index)].add(values)[:num_tokens]

    values = jnp.broadcast_to(values, (token_of_patch.shape[0], *values.shape[1:]))
    return jax.vmap(one_image)(token_of_patch, values)
