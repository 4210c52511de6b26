"""ATS samples tokens by their significance. The number of different tokens varies with the image.

Source: Fayyaz et al., "Adaptive Token Sampling for Efficient Vision Transformers", ECCV 2022, arXiv 2111.15667;
adaptivetokensampling/ATS; reimplemented in JoakimHaurum/TokenReduction, ats.py.
Parity: tests/reduction/test_ats_golden.py.
"""

import jax
import jax.numpy as jnp

from evit_jax.reduction.gather import keep_top
from evit_jax.reduction.reducer import Reducer
from evit_jax.reduction.registry import register_reducer
from evit_jax.reduction.tokens import remap


@register_reducer('ats')
class ATS(Reducer):
    """Samples K tokens by inverse-transform sampling, and masks the slots of tokens that are sampled again.

    Significance (section 3.2): S_j = sum over the heads of a_j |v_j|, divided by its sum over the tokens, with the
    class attention a and the values v of the head. A masked token has S_j = 0.
    Sampling: with C_j = S_1 + ... + S_j, sample k of K is the first token j with C_j >= (2 k - 1) / (2 K).

    A token that is sampled several times stays once. Shapes are static: the other slots hold masked tokens, to which no
    token attends. A masked slot costs as much as a token and has the patch id -1 - tokens.stage. Without a class token,
    or with a chosen importance ('ats:norm'), a_j is `inputs.importance` in all heads.

    Departures: both sources take the token whose C_j is nearest, which gives token j the share (S_j + S_(j+1)) / 2 of
    the samples, not S_j. TokenReduction has the same S; it adds S up in the order of the image, where the tokens of a
    previous reduction come best first here, and rounding often makes it leave out the last sample. The authors' code
    multiplies the attention, summed over the heads, by the norm over all heads, which equals S for one head only; it
    sorts the tokens by S, and scales C to [0, 1].
    """

    importance = ''

    def reduce(self, tokens, inputs, keep):
        norms = jnp.linalg.norm(inputs.values.astype(jnp.float32), axis=-1)  # [B, H, N]
        by_head = inputs.has_class_token and self.importance in ('', 'class')
        a = inputs.class_attention_per_head if by_head else inputs.importance[:, None]
        significance = (a * norms).sum(axis=1) * (1 if tokens.mask is None else jax.lax.stop_gradient(tokens.mask))
        total = significance.cumsum(axis=1)
        steps = (jnp.arange(keep) + 0.5) / keep * total[:, -1:]  # [B, K]
        index = (total[:, None] < steps[..., None]).sum(-1)  # [B, K]
        sampled = jax.vmap(lambda index: jnp.zeros(total.shape[1]).at[index].set(1.0))(index)
        chosen = keep_top(tokens.replace(mask=sampled), sampled * (1 + significance), keep)
        slots = jnp.arange(keep, dtype=jnp.int32)
        return chosen.replace(
            patch_ids=jnp.where(chosen.mask > 0, chosen.patch_ids, -1 - tokens.stage),
            token_of_patch=remap(chosen.token_of_patch, jnp.where(chosen.mask > 0, slots, -1)))
