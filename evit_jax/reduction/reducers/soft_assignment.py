"""The common part of reducers that replace the tokens by weighted sums with learned weights."""

from evit_jax.reduction.merging import merge_soft
from evit_jax.reduction.reducer import Reducer, floor_rate


class SoftAssignment(Reducer):
    """Replaces the tokens by K sums before the block: y_k = sum_i w_ki x_i.

    The module of a reduction returns the weights w [B, K, N] and the tokens x [B, N, D]. Its shapes contain K, so that
    each plan needs its own training.
    """

    before_block = True
    has_sized_modules = True

    def reduce(self, tokens, inputs, keep):
        weights, x = inputs.module(tokens.patches)
        return merge_soft(tokens, weights, x)

    def num_kept(self, patches, entering, rates):
        return floor_rate(patches, entering, rates)

    def module_macs(self, tokens, width, keep):
        return 2 * tokens * keep * width
