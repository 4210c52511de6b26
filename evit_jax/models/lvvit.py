"""LV-ViT: a ViT with a convolutional stem and an auxiliary head, which is trained by token labels.

Source: Token Labeling, arXiv 2104.10858; zihangJiang/TokenLabeling. Parity: tests/models/test_lvvit.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from evit_jax.models import embedding, layers
from evit_jax.models.config import ViTConfig
from evit_jax.models.embedding import Convolution
from evit_jax.models.vit import ViT
from evit_jax.reduction.plan import TokenPlan
from evit_jax.reduction.tokens import Tokens

MOMENTUM = 0.9  # decay of the running statistics; PyTorch's convention calls this 0.1
EPSILON = 1e-5  # added to the variance in batch normalisation
TOKEN_SHARE = 0.5  # weight of the token logits in the image's logits


@dataclasses.dataclass(frozen=True)
class LVViTConfig(ViTConfig):
    """Every value that decides an LV-ViT's parameters and logits."""

    depth: int = 16
    mlp_ratio: float = 3.0
    norm_epsilon: float = 1e-5
    qkv_bias: bool = False
    residual_scale: float = 0.5
    stem_width: int = 64  # channels of the stem's three convolutions
    batchnorm_folded: bool = False  # no batch normalisation, as after `fold_batchnorm`

    def __post_init__(self):
        if self.pooling != 'token':
            raise ValueError(f'an LV-ViT has heads for the class token and for each patch: pooling={self.pooling} is '
                             'for other models, give pooling=token')
        if self.distilled or self.stem or self.patch_size % 2:
            raise ValueError(f'an LV-ViT has no distillation token, a stem of stem_width channels and an even patch '
                             f'size, not distilled={self.distilled}, stem={self.stem}, patch_size={self.patch_size}')
        super().__post_init__()

    @property
    def convolutions(self) -> tuple[Convolution, ...]:
        """The convolutions of the stem. The first halves the height and width of the image."""
        inner = Convolution(3, 1, self.stem_width, self.stem_width)
        return (Convolution(7, 2, 3, self.stem_width), inner, inner)

    def parameters(self, plan: TokenPlan | None = None) -> int:
        """Number of parameters. After folding, a channel has a bias but no scale."""
        return super().parameters(plan) - self.batchnorm_folded * sum(part.channels_out for part in self.convolutions)

    @property
    def num_heads_of_classes(self) -> int:
        """Number of classification heads: one for the class token, one for the patch tokens."""
        return 2

    @property
    def has_token_head(self) -> bool:
        """True: the second head classifies every token that leaves the last block."""
        return True


class BatchNorm(nnx.Module):
    """Batch normalisation over all axes except the last, as in PyTorch.

    The running mean and variance are stored as parameters without a gradient, so that checkpoints, EMA and sharding
    include them. The statistics are computed over the global batch, across all devices.
    """

    def __init__(self, features: int, *, dtype):
        self.dtype = dtype
        self.scale, self.bias = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))
        self.mean, self.var = nnx.Param(jnp.zeros(features)), nnx.Param(jnp.ones(features))

    def __call__(self, x: Array, train: bool) -> tuple[Array, dict[str, Array]]:
        """Normalises by the statistics of the batch in training, and by the running statistics in evaluation.

        Returns:
          The normalised values; the updated running mean and variance in training, {} in evaluation.
        """
        wide = x.astype(jnp.float32)
        mean, var = jax.lax.stop_gradient((self.mean[...], self.var[...]))
        after = {}
        if train:
            axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
            now = wide.mean(axes), wide.var(axes)
            unbiased = now[1] * count / max(count - 1, 1)
            after = {name: jax.lax.stop_gradient(MOMENTUM * old + (1 - MOMENTUM) * new)
                     for name, old, new in (('mean', mean, now[0]), ('var', var, unbiased))}
            mean, var = now
        scale = self.scale[...] * jax.lax.rsqrt(var + EPSILON)
        return ((wide - mean) * scale + self.bias[...]).astype(self.dtype), after


class Stem(nnx.Module):
    """Embeds patches: three normalised convolutions, then a linear map of each patch of their output.

    If `config.batchnorm_folded`, the convolutions have a bias and no batch normalisation.
    """

    def __init__(self, config: LVViTConfig, *, dtype, rngs: nnx.Rngs):
        self.patch_side = config.patch_side
        self.conv1, self.conv2, self.conv3 = (part.layer(bias=config.batchnorm_folded, dtype=dtype, rngs=rngs)
                                              for part in config.convolutions)
        self.bn1, self.bn2, self.bn3 = (None if config.batchnorm_folded else BatchNorm(part.channels_out, dtype=dtype)
                                        for part in config.convolutions)
        self.proj = nnx.Linear(config.patch_values, config.width, kernel_init=embedding.convolution_init, dtype=dtype,
                               rngs=rngs)

    def __call__(self, images: Array, train: bool) -> tuple[Array, dict]:
        """Returns the patch tokens [B, P, D] of images [B, S, S, 3], and the running statistics updated in training."""
        x, statistics = images, {}
        for name, convolution, norm in (('bn1', self.conv1, self.bn1), ('bn2', self.conv2, self.bn2),
                                        ('bn3', self.conv3, self.bn3)):
            x = convolution(x)
            if norm is not None:
                x, statistics[name] = norm(x, train)
            x = jax.nn.relu(x)
        return self.proj(embedding.to_patches(x, self.patch_side)), statistics


def fold_batchnorm(config: LVViTConfig, params: dict) -> tuple[LVViTConfig, dict]:
    """Folds the batch normalisation into the convolutions. Returns a config and parameters with the same logits.

    The running statistics are constants in evaluation, so (w * x - mean) * scale + bias is a convolution with a bias.

    Args:
      params: parameters for `config`; they are not changed.
    """
    if config.batchnorm_folded:
        return config, params
    stem = dict(params['patch_embed'])
    for conv, bn in (('conv1', 'bn1'), ('conv2', 'bn2'), ('conv3', 'bn3')):
        norm = stem.pop(bn)
        scale = norm['scale'] / (norm['var'] + EPSILON) ** 0.5
        stem[conv] = {'kernel': stem[conv]['kernel'] * scale, 'bias': norm['bias'] - norm['mean'] * scale}
    return dataclasses.replace(config, batchnorm_folded=True), params | {'patch_embed': stem}


class LVViT(ViT):
    """An LV-ViT that runs under a token plan.

    The logit of a class is the logit of the class token, plus half of the largest logit of any patch token. Training
    losses read `cls_logits` and `token_logits` from the intermediates. Fused tokens are excluded: they have no token
    labels (as in EViT), so the auxiliary head was never trained on one. Additional intermediates:

      token_logits: [B, N, L], logits of the patch tokens that leave the last block.
      token_patch: [B, N] int32, patch ids of these tokens; a fused token has a negative id.
      statistics: the updated running statistics, as a part of the parameter tree; only in training.
    """

    def __init__(self, config: LVViTConfig, *, dtype=jnp.float32, rngs: nnx.Rngs, **others):
        super().__init__(config, dtype=dtype, rngs=rngs, **others)
        self.patch_embed = Stem(config, dtype=dtype, rngs=rngs)
        self.aux_head = layers.linear(config.width, config.classes, dtype=jnp.float32, rngs=rngs)

    def classify(self, tokens: Tokens, intermediates: dict) -> Array:
        logits = super().classify(tokens, intermediates)
        token_logits = intermediates['token_logits'] = self.aux_head(tokens.patches)
        intermediates['token_patch'] = tokens.patch_ids
        counts = tokens.patch_ids >= 0
        if tokens.mask is not None:
            counts &= tokens.mask > 0
        largest = jnp.where(counts[..., None], token_logits, -jnp.inf).max(axis=1)
        # With only fused tokens left, no token has logits and the maximum is -inf.
        return logits + TOKEN_SHARE * jnp.where(counts.any(axis=1, keepdims=True), largest, 0)

    def _embed_patches(self, images, key, intermediates):
        x, statistics = self.patch_embed(images, train=key is not None)
        if key is not None:
            intermediates['statistics'] = {'patch_embed': statistics}
        return x
