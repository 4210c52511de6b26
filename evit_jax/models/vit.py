"""The vision transformer of DeiT, which drops and fuses tokens by class attention where its plan says so.

Sources: DeiT, arXiv 2012.12877; EViT, arXiv 2202.07800. Parity with the PyTorch code is held by tests/test_golden.py.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from evit_jax.models import layers
from evit_jax.tokens.plan import TokenPlan, block_parameters, blocks_macs
from evit_jax.tokens.reducers import Evidence
from evit_jax.tokens.reduction import Tokens, fused_origin


@dataclasses.dataclass(frozen=True)
class ViTShape:
    """Everything that decides a ViT's parameters."""

    image_size: int = 224     # the size that the position embeddings are made for
    patch_size: int = 16
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    classes: int = 1000
    distilled: bool = False   # a distillation token with a head of its own
    init_std: float = 0.02    # of the initial weights in the blocks; DeiT's value starves a narrow model
    stem: tuple[int, ...] = ()  # channels of 3x3 convolutions, normalised; empty: one linear map of each patch

    def __post_init__(self):
        self.patches(self.image_size)
        if self.stem and math.prod(self.strides) != self.patch_size:
            raise ValueError(f'a stem of {len(self.stem)} convolutions makes patches of {math.prod(self.strides)}, not '
                             f'{self.patch_size}: patch_size must be a power of 2, and the stem as long as that power')

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the stem's convolutions: 2 until a patch is one pixel, then 1, which widens what a token sees."""
        halvings = int(math.log2(self.patch_size))
        return tuple(2 if number < halvings else 1 for number in range(len(self.stem)))

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches: class, and distillation."""
        return 1 + self.distilled

    def patches(self, image_size: int) -> int:
        """Patches of a square image.

        Raises:
          ValueError: the size is not a multiple of the patch.
        """
        if image_size < self.patch_size or image_size % self.patch_size:
            below = image_size // self.patch_size * self.patch_size
            near = ' or '.join(str(size) for size in (below, below + self.patch_size) if size)
            raise ValueError(f'image size {image_size} is not divisible by the patch size {self.patch_size}: '
                             f'use {near}')
        return (image_size // self.patch_size) ** 2

    def macs(self, plan: TokenPlan) -> int:
        """Multiply-accumulates of one image under a plan."""
        side, channels, stem = math.isqrt(plan.patches) * self.patch_size, 3, 0
        for features, stride in zip(self.stem, self.strides):
            side //= stride
            stem, channels = stem + side * side * 9 * channels * features, features
        patch = channels * (1 if self.stem else self.patch_size**2)
        heads = self.prefix * self.width * self.classes
        blocks = blocks_macs(plan, width=self.width, mlp_ratio=self.mlp_ratio, prefix=self.prefix)
        return stem + plan.patches * patch * self.width + blocks + heads

    def parameters(self) -> int:
        """Number of parameters."""
        channels, stem = 3, 0
        for features in self.stem:
            stem, channels = stem + (9 * channels + 2) * features, features
        patch = channels * (1 if self.stem else self.patch_size**2)
        tokens = self.prefix + self.prefix + self.patches(self.image_size)  # prefix tokens, and positions of all
        heads = self.prefix * (self.width + 1) * self.classes
        blocks = self.depth * block_parameters(self.width, self.mlp_ratio)
        return stem + (patch + 1 + tokens + 2) * self.width + blocks + heads


class PatchEmbed(nnx.Module):
    """Patches to tokens: one linear map of each patch, behind overlapping convolutions where the shape has a stem."""

    def __init__(self, shape: ViTShape, *, dtype, rngs: nnx.Rngs):
        self.patch_size = 1 if shape.stem else shape.patch_size
        channels = (3, *shape.stem)
        self.stem = nnx.List([
            nnx.Conv(c_in, c_out, (3, 3), strides=stride, padding=1, use_bias=False, dtype=dtype, rngs=rngs)
            for (c_in, c_out), stride in zip(itertools.pairwise(channels), shape.strides)])
        # Over the pixels of an image: colour and brightness of the ground would else drown the strokes.
        self.norms = nnx.List([nnx.InstanceNorm(features, dtype=dtype, rngs=rngs) for features in shape.stem])
        self.proj = nnx.Linear(channels[-1] * self.patch_size**2, shape.width, kernel_init=layers.convolution_init,
                               dtype=dtype, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        for convolution, norm in zip(self.stem, self.norms, strict=True):
            images = jax.nn.gelu(norm(convolution(images)), approximate=False)
        return self.proj(layers.to_patches(images, self.patch_size))


class Block(nnx.Module):
    """A transformer block; a reduction stands between attention and MLP."""

    def __init__(self, shape: ViTShape, drop_path: float, *, dtype, rngs: nnx.Rngs):
        self.drop_path = drop_path
        self.norm1 = nnx.LayerNorm(shape.width, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.attn = layers.Attention(shape.width, shape.heads, std=shape.init_std, dtype=dtype, rngs=rngs)
        self.norm2 = nnx.LayerNorm(shape.width, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.mlp = layers.Mlp(shape.width, int(shape.width * shape.mlp_ratio), std=shape.init_std, dtype=dtype,
                              rngs=rngs)

    def attend(self, x: Array, key: Array | None, **counts: Array | None) -> tuple[Array, Array, Array]:
        """The attention branch, and the queries and keys in it; `counts` as `Attention` takes them."""
        branch, q, k = self.attn(self.norm1(x), **counts)
        return x + layers.drop_path(branch, self.drop_path, key), q, k

    def think(self, x: Array, key: Array | None) -> Array:
        """The MLP branch."""
        return x + layers.drop_path(self.mlp(self.norm2(x)), self.drop_path, key)


class ViT(nnx.Module):
    """A DeiT that follows a token plan; the same weights run under any plan."""

    def __init__(self, shape: ViTShape, *, drop_path: float = 0.0, dtype=jnp.float32, rngs: nnx.Rngs):
        """Makes the parameters, in float32.

        Args:
          drop_path: share of residual branches dropped at the last block; linear in depth, from 0.
          dtype: of the computation; norms, softmax, class attention and the heads' logits stay float32.
        """
        self.shape, self.dtype = shape, dtype
        tokens = shape.prefix + shape.patches(shape.image_size)
        init = nnx.initializers.truncated_normal(stddev=0.02)
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, shape.width)))
        if shape.distilled:
            self.dist_token = nnx.Param(init(rngs.params(), (1, 1, shape.width)))
        self.pos_embed = nnx.Param(init(rngs.params(), (1, tokens, shape.width)))
        self.patch_embed = PatchEmbed(shape, dtype=dtype, rngs=rngs)
        rates = [drop_path * block / max(shape.depth - 1, 1) for block in range(shape.depth)]
        self.blocks = nnx.List([Block(shape, rate, dtype=dtype, rngs=rngs) for rate in rates])
        self.norm = nnx.LayerNorm(shape.width, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)
        self.head = layers.linear(shape.width, shape.classes, dtype=jnp.float32, rngs=rngs)
        if shape.distilled:
            self.head_dist = layers.linear(shape.width, shape.classes, dtype=jnp.float32, rngs=rngs)

    def __call__(self, images: Array, plan: TokenPlan, *, key: Array | None = None,
                 visible: Array | None = None) -> tuple[Array, dict]:
        """Classifies images.

        Args:
          images: [B, S, S, 3] normalised; position embeddings are resized where S is not the shape's size.
          plan: static; made for the patches of S (or for so many as are visible) and this depth.
          key: for drop path; None in evaluation.
          visible: [B, P] int32, the patches that the first block gets; None: all.

        Returns:
          Logits [B, L] float32 (with distillation the mean of both heads), and what was seen on the way by name.
          Under `jax.jit` whatever of it is not returned costs nothing:
            patch_embed, pos, block00.., norm: activations, prefix tokens first.
            kept: per reduction, [B, K] int32 patch ids that leave it, best first; the fused token of reduction s
              (0-based) is -1-s.
            home: per reduction, [B, P] int32: of each patch of the image, which of the tokens that leave it holds it;
              -1: none.
            class_attention: per reduction, [B, N] float32 over the tokens that enter it.
            patch: [B, N] int32 per reduction, the patch ids that enter it, in the order of class_attention.
            origin: per reduction that fuses, see `fused_origin`: how much of each patch is in the token fused there.
            cls_logits, dist_logits: [B, L] of each head.

        Raises:
          ValueError: the image is not square, not divisible by the patch, or not what the plan is for.
        """
        shape, seen = self.shape, {'kept': (), 'home': (), 'class_attention': (), 'patch': (), 'origin': ()}
        self._check(images, plan, visible)
        x = seen['patch_embed'] = self.patch_embed(images.astype(self.dtype))
        x = seen['pos'] = self._add_prefix_and_positions(x)
        tokens = self._first_tokens(x, plan, visible)
        x, draws = self._with_prefix(x, tokens.x), _draws(images, key)
        for i, (block, keep) in enumerate(zip(self.blocks, plan.keep, strict=True)):
            attend_key, think_key = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, i))
            counts = {'size': self._for_all(tokens.size), 'stays': self._for_all(tokens.stays)}
            x, q, k = block.attend(x, attend_key, **counts)
            if keep is not None:
                tokens = self._reduce(tokens._replace(x=x[:, shape.prefix:]), Evidence(
                    attention=layers.class_attention(q, k, shape.prefix, counts['size']),
                    keys=k.mean(1, dtype=jnp.float32)[:, shape.prefix:], prediction=None, draws=draws,
                    training=key is not None, prefix=shape.prefix), keep, plan, seen)
                x = self._with_prefix(x, tokens.x)
            x = seen[f'block{i:02d}'] = block.think(x, think_key)
        x = seen['norm'] = self.norm(x)
        logits = seen['cls_logits'] = self.head(x[:, 0])
        if shape.distilled:
            seen['dist_logits'] = self.head_dist(x[:, 1])
            logits = (logits + seen['dist_logits']) / 2
        return logits, seen

    def _check(self, images, plan, visible):
        """Raises a ValueError where they do not go together."""
        height, width = images.shape[1:3]
        if height != width:
            raise ValueError(f'images are {height} x {width}: they must be square')
        patches = self.shape.patches(height) if visible is None else visible.shape[1]
        if patches != plan.patches or len(plan.keep) != self.shape.depth:
            raise ValueError(f'the plan is for {plan.patches} patches and {len(plan.keep)} blocks; '
                             f'this input has {patches}, this model {self.shape.depth}')

    def _add_prefix_and_positions(self, x):
        prefix = self.shape.prefix
        batch, patches, width = x.shape
        first = [self.cls_token[...]] + ([self.dist_token[...]] if self.shape.distilled else [])
        first = jnp.broadcast_to(jnp.concatenate(first, axis=1), (batch, prefix, width)).astype(x.dtype)
        positions = self.pos_embed[...]
        grid = layers.resize_positions(positions[0, prefix:], math.isqrt(patches))
        positions = jnp.concatenate([positions[0, :prefix], grid])
        return jnp.concatenate([first, x], axis=1) + positions.astype(x.dtype)

    def _first_tokens(self, x, plan, visible):
        """What the first block gets, of [B, prefix + P, D]."""
        x = x[:, self.shape.prefix:]
        batch, patches, _ = x.shape
        patch = home = jnp.broadcast_to(jnp.arange(patches, dtype=jnp.int32), (batch, patches))
        if visible is not None:
            x, patch = jnp.take_along_axis(x, visible[..., None], axis=1), visible
            places = jnp.arange(visible.shape[1], dtype=jnp.int32)
            home = jax.vmap(lambda ids: jnp.full(patches, -1, jnp.int32).at[ids].set(places))(visible)
        return Tokens(x, patch, home, jnp.ones(patch.shape, jnp.float32) if plan.reducer.merges else None)

    def _reduce(self, tokens, evidence, keep, plan, seen):
        """Asks the plan's reducer, and notes what it did."""
        stage = len(seen['kept'])
        evidence = evidence._replace(draws=jax.vmap(lambda draw: jax.random.fold_in(draw, stage))(evidence.draws))
        after = plan.reducer.reduce(tokens, evidence, keep, stage if plan.fused else None)
        if plan.fused:
            seen['origin'] += (fused_origin(tokens.patch, evidence.attention, after.patch, seen['origin'],
                                            tokens.home.shape[1]),)
        for name, found in (('patch', tokens.patch), ('kept', after.patch), ('home', after.home),
                            ('class_attention', evidence.attention)):
            seen[name] += (found,)
        return after

    def _with_prefix(self, x, patches):
        return jnp.concatenate([x[:, :self.shape.prefix], patches], axis=1)

    def _for_all(self, of_patches):
        """A value of each patch token, [B, N], with 1 for the tokens in front."""
        if of_patches is None:
            return None
        return jnp.pad(of_patches, ((0, 0), (self.shape.prefix, 0)), constant_values=1)


def _draws(images, key):
    """A random key for each image: in evaluation of its pixels alone, in whatever batch it comes."""
    if key is not None:
        return jax.random.split(key, images.shape[0])
    pixels = jax.lax.bitcast_convert_type(images.astype(jnp.float32), jnp.uint32).sum((1, 2, 3), dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), pixels)
