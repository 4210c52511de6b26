"""The vision transformer of DeiT, which reduces its tokens under a token plan.

Source: DeiT, arXiv 2012.12877; EViT, arXiv 2202.07800. Parity: tests/models/test_golden.py.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from evit_jax.kernels.rope import grid_coordinates
from evit_jax.models import embedding, layers
from evit_jax.models.config import ImageSize, ViTConfig
from evit_jax.models.positions import resize_positions
from evit_jax.reduction import apply
from evit_jax.reduction.inputs import ModelInputs
from evit_jax.reduction.plan import TokenPlan
from evit_jax.reduction.reducer import NO_MODULES, Modules
from evit_jax.reduction.tokens import Tokens


class Block(nnx.Module):
    """A transformer block with an optional reduction between attention and MLP."""

    def __init__(self, config: ViTConfig, drop_path: float, *, dtype, remat: bool, rngs: nnx.Rngs):
        norm = functools.partial(nnx.LayerNorm, config.width, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)
        self.drop_path, self.scale, self.remat = drop_path, config.residual_scale, remat
        self.norm1 = norm()
        self.attn = layers.Attention(config, dtype=dtype, rngs=rngs)
        self.norm2 = norm()
        self.mlp = layers.Mlp(config, dtype=dtype, rngs=rngs)
        self.ls1, self.ls2 = (layers.LayerScale(config.width, config.layer_scale) if config.layer_scale else _unchanged
                              for _ in range(2))

    def __call__(self, tokens: Tokens, reduce: apply.Reduce | None = None, *, key: Array | None = None,
                 num_queries: int | None = None) -> Tokens:
        """Computes the block.

        Args:
          reduce: reduces the tokens between attention and MLP.
          key: random key for drop path; None in evaluation.
          num_queries: compute only the outputs of the first `num_queries` tokens; None: of all tokens. With a
            reduction it shortens only the MLP, because the reduction needs the attention output of all tokens.
        """
        attention_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        rematerialise = jax.checkpoint if self.remat and key is not None else _unchanged

        def attention_branch(x, size, mask, coordinates):
            attention = self.attn(self.norm1(x), size=size, mask=mask, coordinates=coordinates,
                                  num_queries=None if reduce else num_queries)
            return attention.replace(out=self._drop_path(self.ls1(attention.out), attention_key))

        def mlp_branch(x):
            return self._drop_path(self.ls2(self.mlp(self.norm2(x))), mlp_key)

        attention = rematerialise(attention_branch)(tokens.x, tokens.size, tokens.mask, tokens.coordinates)
        tokens = tokens.add(attention.out)
        if reduce is not None:  # EViT and ToMe reduce between attention and MLP
            tokens = reduce(tokens, attention)
        tokens = tokens.first(num_queries)
        return tokens.add(rematerialise(mlp_branch)(tokens.x))

    def _drop_path(self, branch, key):
        return self.scale * layers.drop_path(branch, self.drop_path, key)


class ViT(nnx.Module):
    """A DeiT that runs under a token plan. The same weights run under any plan."""

    def __init__(self, config: ViTConfig, *, drop_path: float = 0.0, dtype=jnp.float32, remat: bool = False,
                 gather_impl: str = '', modules: Modules = NO_MODULES, rngs: nnx.Rngs):
        """Initialises the parameters, in float32.

        Args:
          drop_path: probability of dropping a residual branch in the last block; it grows linearly with depth, from 0.
          dtype: dtype of the computation. Norms, softmax, class attention and logits are float32.
          remat: rematerialise in training: save only the inputs of attention and MLP, and recompute the rest in the
            backward pass.
          gather_impl: implementation of the gather of kept tokens; see `gather.get_gather`.
          modules: the learned modules of the model: their reducer and their number.
        """
        self.config, self.dtype, self.gather_impl, self.modules = config, dtype, gather_impl, modules
        init = functools.partial(_token_embedding, config.width, rngs)
        if config.class_token:
            self.cls_token = init(1)
        if config.distilled:
            self.dist_token = init(1)
        if config.registers:
            self.reg_token = init(config.registers)
        if config.absolute_positions:
            self.pos_embed = init(config.num_prefix_positions + config.patches(config.image_size))
        self.patch_embed = embedding.PatchEmbed(config.convolutions, config.patch_side, config.width,
                                                bias=config.patch_bias, dtype=dtype, rngs=rngs)
        norm = functools.partial(nnx.LayerNorm, config.width, epsilon=config.norm_epsilon, rngs=rngs)
        self.norm_pre = norm(dtype=dtype) if config.pre_norm else _unchanged
        rates = [drop_path * block / max(config.depth - 1, 1) for block in range(config.depth)]
        self.blocks = nnx.List([Block(config, rate, dtype=dtype, remat=remat, rngs=rngs) for rate in rates])
        norm = norm(dtype=jnp.float32)
        self.norm, self.fc_norm = (_as_float32, norm) if config.pooling == 'avg_fc_norm' else (norm, _unchanged)
        if config.pooling == 'map':
            self.attn_pool = layers.AttentionPool(config, rngs=rngs)
        head = functools.partial(layers.linear, config.head_width, config.classes, bias=config.head_bias,
                                 dtype=jnp.float32, rngs=rngs)
        self.head = head() if config.classes else _unchanged
        if config.has_dist_head:
            self.head_dist = head()
        if modules.count:
            self.reducer = nnx.List(modules.make(config.width, init_std=config.init_std, dtype=dtype, rngs=rngs))

    def __call__(self, images: Array, plan: TokenPlan, *, key: Array | None = None, patch_tokens: bool = False,
                 visible: Array | None = None, swap: Array | None = None) -> tuple[Array, dict]:
        """Classifies images.

        Args:
          images: [B, H, W, 3] normalised. Position embeddings are resized for other sizes than `config.image_size`.
          plan: static. It must match the number of patches of the image (or of visible patches) and the depth.
          key: random key for drop path and reducers; None in evaluation.
          patch_tokens: also return the patch tokens that leave the model. By default, if no head reads them, the last
            block is computed only for the prefix tokens.
          visible: [B, V] int32, ids of the patches that enter the first block; None: all patches.
          swap: bool [P] or [G, P], patches that MixToken takes from a partner image; see `embedding.swap_patches`.

        Returns:
          Logits [B, L] float32 (the mean of both heads of a distilled model; the features if the model has no head),
          and a dict of intermediates:
            patch_embed, pos, block00, ..., norm: activations, prefix tokens first. `norm` and the last block contain
              only the prefix tokens, unless patch tokens are computed.
            features: [B, D] float32, the input of the head; [B, 2 D] with pooling='token_avg'.
            patch_tokens: [B, N, D] float32, the patch tokens after the last norm, if they are computed.
            cls_logits, dist_logits: [B, L], the logits of each head.
          The other intermediates are tuples with one entry per reduction:
            kept: [B, K] int32, patch ids of the tokens that leave the reduction, best first. The token fused at
              reduction s (from 0) has the id -1 - s.
            patch_ids: [B, N] int32, patch ids of the tokens that enter the reduction.
            token_of_patch: [B, P] int32, index of the token that contains each patch of the image; -1: dropped.
            class_attention: [B, N] float32, for the tokens that enter the reduction; () if the reducer acts before the
              block, or the model has no class token.
            mask: [B, N] float32, only if tokens are masked instead of dropped: 1 kept, 0 masked. It has a gradient.
            fused_weights: [B, P] float32, see `apply.fused_weights`; () if nothing is fused.
            Entries recorded by the reducer with `ReducerInputs.record`.

        Raises:
          ValueError: the image size is not divisible by the patch size, or the plan does not match.
        """
        self._check(images, plan, visible)
        config, intermediates = self.config, {}
        tokens = self.embed(images, plan, key, visible, swap, intermediates)
        reductions = self.reductions(plan, random_keys(images, key), images.shape[1:3])
        patch_tokens = patch_tokens or config.head_reads_patches
        for i, block in enumerate(self.blocks):
            prefix_only = i == config.depth - 1 and not patch_tokens
            tokens = reductions.before_block(i, tokens)
            tokens = block(tokens, reductions.in_block(i), key=None if key is None else jax.random.fold_in(key, i),
                           num_queries=config.num_prefix_tokens if prefix_only else None)
            intermediates[f'block{i:02d}'] = tokens.x
        tokens = tokens.replace(x=self.norm(tokens.x))
        intermediates |= {'norm': tokens.x} | reductions.records()
        if patch_tokens:
            intermediates['patch_tokens'] = tokens.x[:, config.num_prefix_tokens:]
        return self.classify(tokens, intermediates), intermediates

    def reductions(self, plan: TokenPlan, rng: Array, image_size: ImageSize) -> apply.Reductions:
        """Returns the reductions of one forward pass.

        Args:
          rng: [B] random keys, from `random_keys`.
          image_size: (height, width) of the images.
        """
        return apply.Reductions(plan, rng, ModelInputs(
            modules=getattr(self, 'reducer', ()), has_class_token=self.config.class_token,
            coordinates=self._coordinates(image_size), grid=self.config.grid(image_size),
            pool_attention=self._pool_attention if self.config.pooling == 'map' else None))

    def classify(self, tokens: Tokens, intermediates: dict) -> Array:
        """Computes logits [B, L] from the tokens after the last norm. Adds features and logits to `intermediates`."""
        features = intermediates['features'] = self._pool(tokens)
        logits = intermediates['cls_logits'] = self.head(features)
        if self.config.has_dist_head:
            intermediates['dist_logits'] = self.head_dist(tokens.x[:, 1])
            logits = (logits + intermediates['dist_logits']) / 2
        return logits

    def _pool(self, tokens):
        """Returns the input of the head.

        The mean and the attention pool weight each token by the number of its patches, so that a mean over the tokens
        is a mean over the patches, as in ToMe's code for MAE. A masked token has weight 0.
        """
        pooling = self.config.pooling
        if pooling == 'token':
            return tokens.x[:, 0]
        if pooling == 'map':
            return self.attn_pool(tokens.patches.astype(jnp.float32), tokens.weights)
        patches, weights = tokens.patches.astype(jnp.float32), tokens.weights
        total = jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-6)  # all tokens of an image may be masked
        mean = jnp.einsum('bnd,bn->bd', patches, weights / total, precision='highest')
        return jnp.concatenate([tokens.x[:, 0], mean], axis=1) if pooling == 'token_avg' else self.fc_norm(mean)

    def _pool_attention(self, tokens):
        """Returns the attention of the attention pool's query to each patch token, [B, N] float32."""
        x = self.norm(tokens.patches).astype(jnp.float32)
        return self.attn_pool.attention(x, tokens.weights).mean(axis=1)

    def embed(self, images: Array, plan: TokenPlan, key: Array | None, visible: Array | None, swap: Array | None,
              intermediates: dict) -> Tokens:
        """Returns the tokens that enter the first block. Adds patch_embed and pos to `intermediates`.

        Args: see `__call__`.
        """
        x = intermediates['patch_embed'] = self._embed_patches(images.astype(self.dtype), key, intermediates)
        x = x if swap is None else embedding.swap_patches(x, swap)
        x = intermediates['pos'] = self._add_prefix_and_positions(x, self.config.grid(images.shape[1:3]))
        x, prefix, coordinates = self.norm_pre(x), self.config.num_prefix_tokens, self._coordinates(images.shape[1:3])
        batch, patches = x.shape[0], x.shape[1] - prefix
        patch_ids = token_of_patch = jnp.broadcast_to(jnp.arange(patches, dtype=jnp.int32), (batch, patches))
        if visible is not None:
            x = jnp.concatenate(
                [x[:, :prefix], jnp.take_along_axis(x[:, prefix:], visible[..., None], axis=1)], axis=1)
            patch_ids, index = visible, jnp.arange(visible.shape[1], dtype=jnp.int32)
            token_of_patch = jax.vmap(lambda ids: jnp.full(patches, -1, jnp.int32).at[ids].set(index))(visible)
        if coordinates is not None:
            coordinates = coordinates[None] if visible is None else coordinates[visible]
        return plan.reducer.prepare(Tokens(x, patch_ids, token_of_patch, coordinates=coordinates,
                                           gather_impl=self.gather_impl, train=key is not None))

    def _coordinates(self, image_size):
        """Returns the rotary coordinates of all patches, [P, 2] float32; None if the model has none."""
        config = self.config
        if not config.rope:
            return None
        return jnp.asarray(grid_coordinates(config.rope, *config.grid(image_size), reference=config.rope_grid))

    def _embed_patches(self, images, key, intermediates):
        """Returns the patch tokens [B, P, D] of the images."""
        return self.patch_embed(images)

    def _add_prefix_and_positions(self, x, grid):
        config, batch = self.config, x.shape[0]
        names = ('cls_token', 'dist_token', 'reg_token')
        prefix = [getattr(self, name)[...] for name in names if hasattr(self, name)]
        prefix = [jnp.broadcast_to(token, (batch, *token.shape[1:])).astype(x.dtype) for token in prefix]
        x = jnp.concatenate([*prefix, x], axis=1)
        if not config.absolute_positions:
            return x
        num, total = config.num_prefix_positions, config.num_prefix_tokens
        positions = resize_positions(self.pos_embed[0], config.grid(), grid, method=config.position_resize, prefix=num)
        if num < total:
            positions = jnp.concatenate([positions[:num], jnp.zeros((total - num, config.width)), positions[num:]])
        return x + positions.astype(x.dtype)

    def _check(self, images, plan, visible):
        """Raises a ValueError if images, plan and model do not match."""
        patches = self.config.patches(images.shape[1:3]) if visible is None else visible.shape[1]
        self.modules.check(plan)
        self.config.check_reducer(plan)
        if patches != plan.patches or len(plan.keep) != self.config.depth:
            raise ValueError(f'the plan is for {plan.patches} patches and {len(plan.keep)} blocks; '
                             f'this input has {patches}, this model {self.config.depth}')


def _token_embedding(width, rngs, count):
    init = nnx.initializers.truncated_normal(stddev=0.02)
    return nnx.Param(init(rngs.params(), (1, count, width)))


def _as_float32(x):
    return x.astype(jnp.float32)


def _unchanged(function: Callable) -> Callable:
    return function


def random_keys(images: Array, key: Array | None) -> Array:
    """Returns one random key per image, [B]. Without a key (in evaluation), they depend only on the pixels."""
    if key is not None:
        return jax.random.split(key, images.shape[0])
    pixels = jax.lax.bitcast_convert_type(images.astype(jnp.float32), jnp.uint32).sum((1, 2, 3), dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), pixels)
