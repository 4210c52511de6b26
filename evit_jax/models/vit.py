"""The vision transformer of DeiT, which drops and fuses tokens by class attention where its plan says so.

Sources: DeiT, arXiv 2012.12877; EViT, arXiv 2202.07800. Parity: tests/models/test_golden.py.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from evit_jax.models import layers
from evit_jax.models.config import ViTConfig
from evit_jax.models.dynamicvit import Predictor
from evit_jax.reduction.plan import TokenPlan
from evit_jax.reduction.reducers import ReducerInputs
from evit_jax.reduction.tokens import Tokens, fused_origin

_PER_REDUCTION = ('kept', 'token_of_patch', 'class_attention', 'prediction', 'decisions', 'patch', 'origin')


class Block(nnx.Module):
    """A transformer block; a reduction stands between attention and MLP."""

    def __init__(self, config: ViTConfig, drop_path: float, *, dtype, rngs: nnx.Rngs):
        self.drop_path, self.scale = drop_path, config.residual_scale
        self.norm1 = nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)
        self.attn = layers.Attention(config.width, config.heads, qkv_bias=config.qkv_bias, std=config.init_std,
                                     dtype=dtype, rngs=rngs)
        self.norm2 = nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)
        self.mlp = layers.Mlp(config.width, int(config.width * config.mlp_ratio), activation=config.activation,
                              std=config.init_std, dtype=dtype, rngs=rngs)

    def attend(self, x: Array, key: Array | None, rows: int | None = None,
               **counts: Array | None) -> tuple[Array, Array, Array]:
        """The attention branch, and what `Attention` shows; `rows` and `counts` as it takes them."""
        branch, class_row, keys = self.attn(self.norm1(x), rows=rows, **counts)
        return x[:, :rows] + self.scale * layers.drop_path(branch, self.drop_path, key), class_row, keys

    def think(self, x: Array, key: Array | None) -> Array:
        """The MLP branch."""
        return x + self.scale * layers.drop_path(self.mlp(self.norm2(x)), self.drop_path, key)


class ViT(nnx.Module):
    """A DeiT that follows a token plan; the same weights run under any plan."""

    def __init__(self, config: ViTConfig, *, drop_path: float = 0.0, dtype=jnp.float32, remat: bool = False,
                 gather_impl: str = '',
                 rngs: nnx.Rngs):
        """Makes the parameters, in float32.

        Args:
          drop_path: share of residual branches dropped at the last block; linear in depth, from 0.
          dtype: of the computation; norms, softmax, class attention and the heads' logits stay float32.
          remat: in training, of a block only what its two branches begin with is kept for the backward pass, which
            makes the rest again.
          lowering: how a reduction moves the tokens, as `gather_impl.chosen` takes it.
        """
        self.config, self.dtype, self.remat, self.gather_impl = config, dtype, remat, gather_impl
        tokens = config.prefix + config.patches(config.image_size)
        init = nnx.initializers.truncated_normal(stddev=0.02)
        self.cls_token = nnx.Param(init(rngs.params(), (1, 1, config.width)))
        if config.distilled:
            self.dist_token = nnx.Param(init(rngs.params(), (1, 1, config.width)))
        self.pos_embed = nnx.Param(init(rngs.params(), (1, tokens, config.width)))
        self.patch_embed = layers.PatchEmbed(config.convolutions, config.patch_side, config.width, dtype=dtype,
                                             rngs=rngs)
        rates = [drop_path * block / max(config.depth - 1, 1) for block in range(config.depth)]
        self.blocks = nnx.List([Block(config, rate, dtype=dtype, rngs=rngs) for rate in rates])
        norm = nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, dtype=jnp.float32, rngs=rngs)
        if config.pooling == 'avg_fc_norm':
            self.fc_norm = norm
        self.norm = _as_float32 if config.pooling == 'avg_fc_norm' else norm
        self.head = layers.linear(config.width, config.classes, dtype=jnp.float32, rngs=rngs)
        if config.distilled and not config.one_head:
            self.head_dist = layers.linear(config.width, config.classes, dtype=jnp.float32, rngs=rngs)
        if config.predictors:
            self.score_predictor = nnx.List([Predictor(config.width, std=config.init_std, dtype=dtype, rngs=rngs)
                                             for _ in range(config.predictors)])

    def __call__(self, images: Array, plan: TokenPlan, *, key: Array | None = None,
                 visible: Array | None = None, swap: Array | None = None) -> tuple[Array, dict]:
        """Classifies images.

        Args:
          images: [B, S, S, 3] normalised; position embeddings are resized where S is not the shape's size.
          plan: static; made for the patches of S (or for so many as are visible) and this depth.
          key: for drop path; None in evaluation.
          visible: [B, P] int32, the patches that the first block gets; None: all.
          swap: bool [P] or [G, P], patches that come from the image's partner: see `layers.swap_patches`.

        Returns:
          Logits [B, L] float32 (with distillation the mean of both heads), and what was seen on the way by name.
          Under `jax.jit` whatever of it is not returned costs nothing, most of the last block where the heads read the
          prefix alone:
            patch_embed, pos, block00.., norm: activations, prefix tokens first. With pooling avg_fc_norm nothing
              normalises them, and norm is the last block's.
            kept: per reduction, [B, K] int32 patch ids that leave it, best first; the fused token of reduction s
              (0-based) is -1-s.
            home: per reduction, [B, P] int32: of each patch of the image, which of the tokens that leave it holds it;
              -1: none.
            class_attention: per reduction, [B, N] float32 over the tokens that enter it; () where it is in front of
              the block.
            prediction: likewise [B, N, 2], of the predictors, where they are asked.
            decisions: per reduction that masks in place of dropping, [B, N] float32: 1 of what stays, or 0; it has a
              gradient.
            patch: [B, N] int32 per reduction, the patch ids that enter it, in the order of class_attention.
            origin: per reduction that fuses, see `fused_origin`: how much of each patch is in the token fused there.
            features: [B, D] float32, the vector that the classification head reads.
            patch_tokens: [B, N, D] float32, the tokens of `norm` without the prefix tokens.
            cls_logits, dist_logits: [B, L] of each head.

        Raises:
          ValueError: the image is not square, not divisible by the patch, or not what the plan is for.
        """
        config, seen = self.config, dict.fromkeys(_PER_REDUCTION, ())
        self._check(images, plan, visible)
        x = seen['patch_embed'] = self._embed(images.astype(self.dtype), seen, train=key is not None)
        x = x if swap is None else layers.swap_patches(x, swap)
        x = seen['pos'] = self._add_prefix_and_positions(x)
        tokens = self._first_tokens(x, plan, visible)
        x, draws = tokens.x, _draws(images, key)
        for i, (block, keep) in enumerate(zip(self.blocks, plan.keep, strict=True)):
            attend_key, think_key = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, i))
            attend, think = self._branches(block, train=key is not None)
            evidence = ReducerInputs(None, None, None, draws, training=key is not None, gather_impl=self.gather_impl)
            if keep is not None and plan.reducer.predicts:
                predict = self.score_predictor[plan.reductions.index(i)]
                evidence = evidence._replace(prediction=predict(x[:, config.prefix:], tokens.mask))
                x, tokens = self._reduce(x, tokens, evidence, keep, plan, seen)
            counts = {'size': self._for_all(tokens.size), 'mask': self._for_all(tokens.mask)}
            before, (x, class_row, keys) = x, attend(x, attend_key, None, **counts)
            if keep is not None and not plan.reducer.predicts:
                evidence = evidence._replace(attention=class_row[:, config.prefix:], keys=keys[:, config.prefix:])
                x, tokens = self._reduce(x, tokens, evidence, keep, plan, seen)
            x = seen[f'block{i:02d}'] = think(x, think_key)
        x = seen['norm'] = self.norm(x)
        if config.depth and not config.head_reads_patches:
            # The last block once more for what the heads read: the rest of it is then only computed if returned.
            x, _, _ = attend(before, attend_key, config.prefix, **counts)
            x = self.norm(think(x, think_key))
        return self.classify(x, tokens, seen), seen

    def _branches(self, block, train):
        """A block's `attend`, with `rows` in its place, and `think`."""
        if not (self.remat and train):
            return block.attend, block.think
        return jax.checkpoint(block.attend, static_argnums=2), jax.checkpoint(block.think)

    def classify(self, x: Array, tokens: Tokens, seen: dict) -> Array:
        """The last norm's tokens, prefix first, to logits; `tokens` says what those of the patches are."""
        seen['features'], seen['patch_tokens'] = self._pooled(x, tokens), seen['norm'][:, self.config.prefix:]
        logits = seen['cls_logits'] = self.head(seen['features'])
        if self.config.distilled and not self.config.one_head:
            seen['dist_logits'] = self.head_dist(x[:, 1])
            logits = (logits + seen['dist_logits']) / 2
        return logits

    def _pooled(self, x, tokens):
        """The vector that the head reads, [B, D].

        The mean is over the patch tokens that leave the last block. A merged token counts as many times as it has
        patches, as in ToMe's code for MAE. A masked token does not count. EViT's fused token counts once, as it does
        in attention.
        """
        if self.config.pooling == 'token':
            return x[:, 0]
        patches = x[:, self.config.prefix:].astype(jnp.float32)
        weight = jnp.ones(patches.shape[:2], jnp.float32)
        for factor in (tokens.size, tokens.mask):
            weight = weight if factor is None else weight * factor
        total = jnp.maximum(weight.sum(axis=1, keepdims=True), 1e-6)  # every token of an image may be masked
        mean = jnp.einsum('bnd,bn->bd', patches, weight / total, precision='highest')
        return self.fc_norm(mean) if self.config.pooling == 'avg_fc_norm' else mean

    def _embed(self, images, seen, train):
        """Images to tokens [B, P, D]."""
        return self.patch_embed(images)

    def _check(self, images, plan, visible):
        """Raises a ValueError where they do not go together."""
        height, width = images.shape[1:3]
        if height != width:
            raise ValueError(f'images are {height} x {width}: they must be square')
        patches = self.config.patches(height) if visible is None else visible.shape[1]
        self.config.check_plan(plan)
        if patches != plan.patches or len(plan.keep) != self.config.depth:
            raise ValueError(f'the plan is for {plan.patches} patches and {len(plan.keep)} blocks; '
                             f'this input has {patches}, this model {self.config.depth}')

    def _add_prefix_and_positions(self, x):
        prefix = self.config.prefix
        batch, patches, width = x.shape
        first = [self.cls_token[...]] + ([self.dist_token[...]] if self.config.distilled else [])
        first = jnp.broadcast_to(jnp.concatenate(first, axis=1), (batch, prefix, width)).astype(x.dtype)
        positions = self.pos_embed[...]
        grid = layers.resize_positions(positions[0, prefix:], math.isqrt(patches))
        positions = jnp.concatenate([positions[0, :prefix], grid])
        return jnp.concatenate([first, x], axis=1) + positions.astype(x.dtype)

    def _first_tokens(self, x, plan, visible):
        """What the first block gets, of [B, F + P, D]."""
        batch, patches = x.shape[0], x.shape[1] - self.config.prefix
        patch = token_of_patch = jnp.broadcast_to(jnp.arange(patches, dtype=jnp.int32), (batch, patches))
        if visible is not None:
            in_front, x = jnp.split(x, [self.config.prefix], axis=1)
            x = jnp.concatenate([in_front, jnp.take_along_axis(x, visible[..., None], axis=1)], axis=1)
            patch, places = visible, jnp.arange(visible.shape[1], dtype=jnp.int32)
            token_of_patch = jax.vmap(lambda ids: jnp.full(patches, -1, jnp.int32).at[ids].set(places))(visible)
        return Tokens(x, patch, token_of_patch, jnp.ones(patch.shape, jnp.float32) if plan.reducer.merges else None)

    def _reduce(self, x, tokens, evidence, keep, plan, seen):
        """Asks the plan's reducer, and notes what it did; returns the tokens' values, and what is known of them."""
        stage = len(seen['kept'])
        evidence = evidence._replace(draws=jax.vmap(lambda draw: jax.random.fold_in(draw, stage))(evidence.draws))
        after = plan.reducer.reduce(tokens._replace(x=x), evidence, keep, stage if plan.fused else None)
        if plan.fused:
            seen['origin'] += (fused_origin(tokens.patch, evidence.attention, after.patch, seen['origin'],
                                            tokens.token_of_patch.shape[1]),)
        for name, found in (('patch', tokens.patch), ('kept', after.patch), ('token_of_patch', after.token_of_patch),
                            ('class_attention', evidence.attention), ('prediction', evidence.prediction),
                            ('decisions', after.mask)):
            seen[name] += () if found is None else (found,)
        return after.x, after

    def _for_all(self, of_patches):
        """A value of each patch token, [B, N], with 1 for the tokens in front."""
        if of_patches is None:
            return None
        return jnp.pad(of_patches, ((0, 0), (self.config.prefix, 0)), constant_values=1)


def _as_float32(x):
    return x.astype(jnp.float32)


def _draws(images, key):
    """A random key for each image: in evaluation of its pixels alone, in whatever batch it comes."""
    if key is not None:
        return jax.random.split(key, images.shape[0])
    pixels = jax.lax.bitcast_convert_type(images.astype(jnp.float32), jnp.uint32).sum((1, 2, 3), dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), pixels)
