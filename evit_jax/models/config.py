"""The config of a vision transformer."""

import dataclasses
import math

from evit_jax.kernels.gelu import ACTIVATIONS
from evit_jax.models import costs
from evit_jax.models.layers import Convolution
from evit_jax.reduction.plan import TokenPlan

POOLINGS = {
    'token': 'the last norm, then the prefix tokens',
    'avg': "the last norm, then the mean of the patch tokens (timm's global_pool='avg' with fc_norm=False)",
    'avg_fc_norm': "the mean of the patch tokens, then a norm (timm's global_pool='avg', as MAE is fine-tuned)"}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """All values that determine a ViT's parameters and how it computes logits."""

    image_size: int = 224     # side in pixels; the position embeddings are made for this size
    patch_size: int = 16
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    classes: int = 1000
    distilled: bool = False   # adds a distillation token with its own head
    init_std: float = 0.02    # standard deviation of the blocks' initial weights; narrow models need a larger one
    stem: tuple[int, ...] = ()  # channels of the 3x3 convolutions, each with a norm; (): no stem
    norm_epsilon: float = 1e-6  # epsilon of all layer norms
    qkv_bias: bool = True
    residual_scale: float = 1.0  # scale of the attention and MLP branches
    activation: str = 'gelu'  # activation of the MLPs: a key of kernels.gelu.ACTIVATIONS
    pooling: str = 'token'    # input of the head; one of POOLINGS
    one_head: bool = False    # True: a distilled model in which only the class token has a head

    def __post_init__(self):
        self.patches(self.image_size)
        self._check_values()
        strides = math.prod(convolution.stride for convolution in self.convolutions)
        if self.stem and strides != self.patch_size:
            raise ValueError(f'a stem of {len(self.stem)} convolutions makes patches of {strides}, not '
                             f'{self.patch_size}: patch_size must be a power of 2, and the stem as long as that power')

    def _check_values(self):
        """Raises a ValueError if a value that does not affect array shapes is out of range."""
        if self.heads < 1 or self.width % self.heads:
            fit = ', '.join(str(heads) for heads in range(1, self.width + 1) if self.width % heads == 0)
            raise ValueError(f'a width of {self.width} cannot be divided among {self.heads} heads: give one of {fit}')
        if not 0 < self.norm_epsilon < 1:
            raise ValueError(f'norm_epsilon={self.norm_epsilon:g} is outside (0, 1): 1e-6 is usual')
        for key, value, known in (('activation', self.activation, ACTIVATIONS), ('pooling', self.pooling, POOLINGS)):
            if value not in known:
                raise ValueError(f'{key}={value!r} is unknown: there are {", ".join(known)}')
        if self.distilled and self.pooling != 'token':
            raise ValueError(f'pooling={self.pooling} reads no distillation token: give pooling=token, or '
                             'distilled=False')
        if self.one_head and not self.distilled:
            raise ValueError('one_head=True is for a model with a distillation token: give distilled=True, or '
                             'one_head=False')

    @property
    def convolutions(self) -> tuple[Convolution, ...]:
        """Convolutions of the stem: stride 2 until a patch is one pixel, then stride 1 (a larger receptive field)."""
        halvings = int(math.log2(self.patch_size))
        return tuple(Convolution(3, 2 if number < halvings else 1, *channels)
                     for number, channels in enumerate(zip((3, *self.stem), self.stem)))

    @property
    def patch_side(self) -> int:
        """Side of a patch in the stem's output, in pixels."""
        return self.patch_size // math.prod(convolution.stride for convolution in self.convolutions)

    @property
    def patch_values(self) -> int:
        """Number of values in a patch of the stem's output."""
        return self.patch_side**2 * (self.convolutions[-1].channels_out if self.convolutions else 3)

    @property
    def num_heads_of_classes(self) -> int:
        """Number of classification heads: one for each prefix token."""
        return 1 if self.one_head else self.num_prefix_tokens

    @property
    def has_token_head(self) -> bool:
        """True if an auxiliary head classifies each patch token."""
        return False

    @property
    def head_reads_patches(self) -> bool:
        """True if a head reads the patch tokens that leave the last block, False if heads read only prefix tokens."""
        return self.has_token_head or self.pooling != 'token'

    @property
    def default_reduce_at(self) -> tuple[int, ...]:
        """Default blocks that reduce tokens: at a quarter, half and three quarters of the depth."""
        return tuple(dict.fromkeys(self.depth * quarter // 4 for quarter in (1, 2, 3)))

    @property
    def num_prefix_tokens(self) -> int:
        """Number of prefix tokens: the class token and an optional distillation token."""
        return 1 + self.distilled

    def patches(self, image_size: int) -> int:
        """Returns the number of patches of a square image.

        Raises:
          ValueError: the size is not a multiple of the patch size.
        """
        if image_size < self.patch_size or image_size % self.patch_size:
            below = image_size // self.patch_size * self.patch_size
            near = ' or '.join(str(size) for size in (below, below + self.patch_size) if size)
            raise ValueError(f'image size {image_size} is not divisible by the patch size {self.patch_size}: '
                             f'use {near}')
        return (image_size // self.patch_size) ** 2

    def num_classified(self, plan: TokenPlan) -> int:
        """Number of vectors to which classification heads are applied. The mean of the patch tokens is one vector."""
        return 1 if self.one_head else self.num_prefix_tokens + self.has_token_head * plan.counts[-1]

    def macs(self, plan: TokenPlan) -> int:
        """Multiply-accumulates of one image under a plan; see `costs.macs`."""
        return costs.macs(self, plan)

    def executed_macs(self, plan: TokenPlan) -> int:
        """Multiply-accumulates needed to compute the logits of one image; see `costs.executed_macs`."""
        return costs.executed_macs(self, plan)

    def parameters(self, plan: TokenPlan | None = None) -> int:
        """Number of parameters; see `costs.parameters`."""
        return costs.parameters(self, plan)
