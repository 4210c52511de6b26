"""EViT, of a DeiT or an LV-ViT, in plain PyTorch, to measure against: the same weights, the same plan, no more work.

It is written as functions over a dict of tensors, for torch may be imported only where it is used; beside the same
model of `torch.nn` modules it lacks their bookkeeping, which favours PyTorch. Attention is
`scaled_dot_product_attention`, with the class token's row as a small product of its own where tokens are dropped; or,
as in the papers' code, the whole N x N matrix (`plain`).
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from evit_jax.models.config import ViTConfig
from evit_jax.models.lvvit import TOKEN_SHARE, LVViTConfig
from evit_jax.reduction.plan import TokenPlan

EAGER, PLAIN, COMPILED = RIVALS = 'torch', 'torch, plain attention', 'torch.compile'


def import_torch() -> Any:
    """The torch package.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ValueError("--against=torch needs PyTorch, which is not installed here: pip install -e '.[torch]', or "
                         'leave --against out') from error
    return torch


def set_up(device: str, threads: int, programs: int) -> str:
    """Makes torch ready to be timed beside JAX, and says how.

    Args:
      device: what JAX computes on, cpu or gpu.
      threads: on CPU, as many as JAX has.
      programs: that will be compiled; torch.compile by itself falls back to eager after 8 of the same code.

    Raises:
      ValueError: torch is not installed, or cannot use the device.
    """
    torch = import_torch()
    if device != 'cpu' and not (device == 'gpu' and torch.cuda.is_available()):
        raise ValueError(f'--against=torch: JAX computes on {device}, and torch {torch.__version__} cannot: install '
                         'a torch for it, or measure on the CPU with JAX_PLATFORMS=cpu')
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision('high')  # on GPUs TF32, as JAX has by default; on CPUs float32 all the same
    torch._dynamo.config.recompile_limit = 8 + programs
    torch._inductor.config.force_disable_caches = True  # or compile times would be those of reading
    return torch.__version__


class TorchEViT:
    """A ViT without distillation, ready to classify under any plan for its image size."""

    def __init__(self, weights: Mapping[str, np.ndarray], config: ViTConfig, *, dtype: str, device: str):
        """Places the weights.

        Args:
          weights: by timm's names, as `interchange.vit.to_torch` makes them.
          dtype: of weights and computation.
          device: cpu or gpu.
        """
        assert not config.distilled
        if (config.activation, config.pooling) != ('gelu', 'token'):
            raise ValueError(f'--against=torch computes exact GELU and reads the class token, and this model has '
                             f'activation={config.activation} and pooling={config.pooling}: leave it out')
        self._torch, self._config = import_torch(), config
        self._f = self._torch.nn.functional
        self._dtype, self._device = getattr(self._torch, dtype), 'cuda' if device == 'gpu' else device
        self._in_lvvit = isinstance(config, LVViTConfig)
        self._weights = {name: self.tensor(np.array(value)) for name, value in weights.items()}

    def tensor(self, value: np.ndarray) -> Any:
        """An array as a tensor of the model's dtype, on its device."""
        return self._torch.from_numpy(value).to(device=self._device, dtype=self._dtype)

    def forward(self, plan: TokenPlan, engine: str) -> Callable[[Any], Any]:
        """Images [B, 3, S, S] to logits under a plan, as one of RIVALS does it."""
        run = functools.partial(self.logits, plan=plan, plain=engine == PLAIN)
        if engine == COMPILED:  # with fullgraph, what it cannot compile is an error and not run eagerly
            run = self._torch.compile(run, fullgraph=True, dynamic=False)
        return self._torch.inference_mode()(run)

    def wait(self, result: Any) -> None:
        """Returns when all that was begun is done; a CPU does it at once."""
        if self._device == 'cuda':
            self._torch.cuda.synchronize()

    def logits(self, images: Any, plan: TokenPlan, plain: bool = False) -> Any:
        """Logits [B, L] of normalised images [B, 3, S, S]."""
        x = self._patches(images)
        first = self._weights['cls_token'].expand(len(x), -1, -1)
        x = self._torch.cat([first, x], dim=1) + self._weights['pos_embed']
        ranks = []
        for block, keep in enumerate(plan.keep):
            x = self._block(x, f'blocks.{block}.', keep, plan.fused, plain, ranks)
        if not self._in_lvvit:
            return self._linear(self._norm(x[:, 0], 'norm'), 'head')
        x = self._norm(x, 'norm')
        fused = self._which_are_fused(ranks, plan)
        of_tokens = self._linear(x[:, 1:], 'aux_head')
        of_tokens = of_tokens if fused is None else of_tokens.masked_fill(fused[..., None], -math.inf)
        return self._linear(x[:, 0], 'head') + TOKEN_SHARE * of_tokens.amax(1)

    def _which_are_fused(self, ranks, plan):
        """Bool [B, N] of the tokens that are left; None where none can be."""
        fused = None
        for rank in ranks if plan.fused else ():
            kept = self._torch.zeros_like(rank, dtype=self._torch.bool) if fused is None else fused.gather(1, rank)
            fused = self._f.pad(kept, (0, 1), value=True)
        return fused

    def _patches(self, images):
        """[B, N, D]."""
        for number, convolution in enumerate(self._config.convolutions):
            layer, norm = ((f'conv{number + 1}', f'bn{number + 1}') if self._in_lvvit else
                           (f'stem.{number}', f'norms.{number}'))
            convolved = self._f.conv2d(images, self._weights[f'patch_embed.{layer}.weight'], stride=convolution.stride,
                                       padding=convolution.side // 2)
            images = (self._batch_norm if self._in_lvvit else self._instance_norm)(convolved, f'patch_embed.{norm}.')
        kernel, bias = (self._weights[f'patch_embed.proj.{part}'] for part in ('weight', 'bias'))
        return self._f.conv2d(images, kernel, bias, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)

    def _instance_norm(self, x, name):
        return self._f.gelu(self._f.instance_norm(x, weight=self._weights[name + 'weight'],
                                                  bias=self._weights[name + 'bias'], eps=1e-6))

    def _batch_norm(self, x, name):
        values = (self._weights[name + part] for part in ('running_mean', 'running_var', 'weight', 'bias'))
        return self._f.relu(self._f.batch_norm(x, *values, eps=1e-5))

    def _block(self, x, name, keep, fused, plain, ranks):
        """A transformer block; a reduction stands between attention and MLP, and adds what it kept to `ranks`."""
        branch, attention = self._attend(self._norm(x, name + 'norm1'), name + 'attn.', keep is not None, plain)
        x = x.add(branch, alpha=self._config.residual_scale)
        if keep is not None:
            ranks.append(attention.topk(keep, dim=1).indices)
            x = self._reduce(x, attention, ranks[-1], fused)
        hidden = self._f.gelu(self._linear(self._norm(x, name + 'norm2'), name + 'mlp.fc1'))
        return x.add(self._linear(hidden, name + 'mlp.fc2'), alpha=self._config.residual_scale)

    def _attend(self, x, name, reduces, plain):
        """The branch [B, N, D], and where the class token looks, [B, N - 1], if tokens are to be dropped."""
        batch, n, width = x.shape
        head = width // self._config.heads
        qkv = self._linear(x, name + 'qkv').reshape(batch, n, 3, self._config.heads, head).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each [B, H, N, d]
        attention = None
        if plain:
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
        """The class token, the tokens of a rank, and the sum of the others by attention."""
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
