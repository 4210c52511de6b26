"""A baseline: EViT on a DeiT or an LV-ViT in plain PyTorch, with the same weights, the same plan and no extra work.

The model is written as functions over a dict of tensors, because torch is imported only when it is used. The overhead
of `torch.nn` modules is absent, which favours PyTorch. Attention is `scaled_dot_product_attention`. Blocks that drop
tokens compute the class token's row of the attention as a separate small product. The engine 'torch, plain attention'
computes the whole N x N matrix, like the code of the papers.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from evit_jax.models.config import ViTConfig
from evit_jax.models.lvvit import TOKEN_SHARE, LVViTConfig
from evit_jax.reduction.plan import TokenPlan

# Config fields that must have their default values.
_FIXED = ('activation', 'pooling', 'distilled', 'class_token', 'registers', 'absolute_positions', 'rope', 'qk_norm',
          'pre_norm', 'swiglu')
EAGER, FULL_ATTENTION, COMPILED = ENGINES = 'torch', 'torch, plain attention', 'torch.compile'


def import_torch() -> Any:
    """Imports and returns the torch package.

    Raises:
      ValueError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ValueError("--against=torch needs PyTorch, which is not installed here: pip install -e '.[torch]', or "
                         'leave --against out') from error
    return torch


def configure(device: str, threads: int, programs: int) -> str:
    """Configures torch for a fair comparison with JAX, and returns its version.

    Args:
      device: platform that JAX computes on, 'cpu' or 'gpu'.
      threads: number of CPU threads, equal to that of JAX.
      programs: number of programs to compile. It raises torch.compile's default limit: after 8 versions of the same
        code, torch.compile would fall back to eager mode.

    Raises:
      ValueError: torch is not installed, or does not support the device.
    """
    torch = import_torch()
    if device != 'cpu' and not (device == 'gpu' and torch.cuda.is_available()):
        raise ValueError(f'--against=torch: JAX computes on {device}, and torch {torch.__version__} cannot: install '
                         'a torch for it, or measure on the CPU with JAX_PLATFORMS=cpu')
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision('high')  # selects TF32 on GPUs, JAX's default; CPUs still use float32
    torch._dynamo.config.recompile_limit = 8 + programs
    torch._inductor.config.force_disable_caches = True  # otherwise compile times would only include reading the cache
    return torch.__version__


def check_config(config: ViTConfig) -> None:
    """Raises a ValueError if the model is not a plain ViT or LV-ViT with a class token."""
    plain = ViTConfig()
    if other := [name for name in _FIXED if getattr(config, name) != getattr(plain, name)]:
        raise ValueError(f'--against=torch implements {other[0]}={getattr(plain, other[0])!r} only, and this model has '
                         f'{getattr(config, other[0])!r}: leave the model or --against=torch out')


class TorchEViT:
    """A ViT without distillation token. It supports any token plan for its image size."""

    def __init__(self, weights: Mapping[str, np.ndarray], config: ViTConfig, *, dtype: str, device: str):
        """Moves the weights to the device.

        Args:
          weights: arrays by timm's names, as returned by `interchange.torch_weights.to_torch`.
          dtype: dtype of the weights and of the computation.
          device: 'cpu' or 'gpu'.

        Raises:
          ValueError: the architecture is not implemented here.
        """
        check_config(config)
        self._torch, self._config = import_torch(), config
        self._f = self._torch.nn.functional
        self._dtype, self._device = getattr(self._torch, dtype), 'cuda' if device == 'gpu' else device
        self._is_lvvit = isinstance(config, LVViTConfig)
        self._weights = {name: self.tensor(np.array(value)) for name, value in weights.items()}

    def tensor(self, value: np.ndarray) -> Any:
        """Returns the array as a tensor of the model's dtype, on its device."""
        return self._torch.from_numpy(value).to(device=self._device, dtype=self._dtype)

    def forward(self, plan: TokenPlan, engine: str) -> Callable[[Any], Any]:
        """Returns the function that maps images [B, 3, S, S] to logits [B, L] under a plan.

        Args:
          engine: one of ENGINES.
        """
        run = functools.partial(self.logits, plan=plan, full_attention=engine == FULL_ATTENTION)
        if engine == COMPILED:  # fullgraph=True raises an error for code that cannot be compiled
            run = self._torch.compile(run, fullgraph=True, dynamic=False)
        return self._torch.inference_mode()(run)

    def wait(self, result: Any) -> None:
        """Blocks until the device has finished all calls. CPU calls are synchronous."""
        if self._device == 'cuda':
            self._torch.cuda.synchronize()

    def logits(self, images: Any, plan: TokenPlan, full_attention: bool = False) -> Any:
        """Returns the logits [B, L] of normalised images [B, 3, S, S].

        Args:
          full_attention: if True, computes the whole attention matrix.
        """
        x = self._patches(images)
        class_token = self._weights['cls_token'].expand(len(x), -1, -1)
        x = self._torch.cat([class_token, x], dim=1) + self._weights['pos_embed']
        ranks = []
        for block, keep in enumerate(plan.keep):
            x = self._block(x, f'blocks.{block}.', keep, plan.fused, full_attention, ranks)
        if not self._is_lvvit:
            features = self._norm(x[:, 0], 'norm')
            return self._linear(features, 'head') if self._config.classes else features
        x = self._norm(x, 'norm')
        fused = self._fused_mask(ranks, plan)
        token_logits = self._linear(x[:, 1:], 'aux_head')
        if fused is not None:
            token_logits = token_logits.masked_fill(fused[..., None], -math.inf)
        return self._linear(x[:, 0], 'head') + TOKEN_SHARE * token_logits.amax(1)

    def _fused_mask(self, ranks, plan):
        """Returns a mask of the fused tokens among the remaining ones, [B, N] bool; None if the plan does not fuse."""
        fused = None
        for rank in ranks if plan.fused else ():
            kept = self._torch.zeros_like(rank, dtype=self._torch.bool) if fused is None else fused.gather(1, rank)
            fused = self._f.pad(kept, (0, 1), value=True)
        return fused

    def _patches(self, images):
        """Returns the patch embeddings [B, N, D]."""
        for number, convolution in enumerate(self._config.convolutions):
            layer, norm = ((f'conv{number + 1}', f'bn{number + 1}') if self._is_lvvit else
                           (f'stem.{number}', f'norms.{number}'))
            convolved = self._f.conv2d(images, self._weights[f'patch_embed.{layer}.weight'], stride=convolution.stride,
                                       padding=convolution.side // 2)
            images = (self._batch_norm if self._is_lvvit else self._instance_norm)(convolved, f'patch_embed.{norm}.')
        kernel, bias = (self._weights[f'patch_embed.proj.{part}'] for part in ('weight', 'bias'))
        return self._f.conv2d(images, kernel, bias, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)

    def _instance_norm(self, x, name):
        return self._f.gelu(self._f.instance_norm(x, weight=self._weights[name + 'weight'],
                                                  bias=self._weights[name + 'bias'], eps=1e-6))

    def _batch_norm(self, x, name):
        values = (self._weights[name + part] for part in ('running_mean', 'running_var', 'weight', 'bias'))
        return self._f.relu(self._f.batch_norm(x, *values, eps=1e-5))

    def _block(self, x, name, keep, fused, full_attention, ranks):
        """Applies a transformer block. A reduction takes place before the MLP; kept indices are appended to `ranks`."""
        branch, attention = self._attention_branch(self._norm(x, name + 'norm1'), name + 'attn.', keep is not None,
                                                   full_attention)
        x = x.add(self._scale(branch, name + 'ls1'), alpha=self._config.residual_scale)
        if keep is not None:
            ranks.append(attention.topk(keep, dim=1).indices)
            x = self._reduce(x, attention, ranks[-1], fused)
        hidden = self._f.gelu(self._linear(self._norm(x, name + 'norm2'), name + 'mlp.fc1'))
        mixed = self._scale(self._linear(hidden, name + 'mlp.fc2'), name + 'ls2')
        return x.add(mixed, alpha=self._config.residual_scale)

    def _scale(self, x, name):
        """Applies LayerScale if the model has it."""
        gamma = self._weights.get(name + '.gamma')
        return x if gamma is None else x * gamma

    def _attention_branch(self, x, name, reduces, full_attention):
        """Returns the output [B, N, D], and the class attention [B, N - 1], or None if the block does not reduce."""
        batch, n, width = x.shape
        head = width // self._config.heads
        qkv = self._linear(x, name + 'qkv').reshape(batch, n, 3, self._config.heads, head).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each [B, H, N, d]
        attention = None
        if full_attention:
            weights = (q * head**-0.5 @ k.transpose(-2, -1)).softmax(-1)  # [B, H, N, N]
            mixed = weights @ v
            if reduces:
                attention = weights[:, :, 0, 1:].mean(1)
        else:
            mixed = self._f.scaled_dot_product_attention(q, k, v)
            if reduces:
                row = (q[:, :, :1] * head**-0.5 @ k.transpose(-2, -1)).softmax(-1)  # [B, H, 1, N]
                attention = row[:, :, 0, 1:].mean(1)
        return self._linear(mixed.transpose(1, 2).reshape(batch, n, width), name + 'proj'), attention

    def _reduce(self, x, attention, rank, fused):
        """Returns the class token, the tokens at `rank`, and the sum of all others, weighted by class attention."""
        patches = x[:, 1:]
        parts = [x[:, :1], patches.gather(1, rank[..., None].expand(-1, -1, x.shape[-1]))]
        if fused:
            parts.append(attention.scatter(1, rank, 0)[:, None] @ patches)
        return self._torch.cat(parts, dim=1)

    def _linear(self, x, name):
        return self._f.linear(x, self._weights[name + '.weight'], self._weights.get(name + '.bias'))

    def _norm(self, x, name):
        return self._f.layer_norm(x, x.shape[-1:], self._weights[name + '.weight'], self._weights[name + '.bias'],
                                  self._config.norm_epsilon)
