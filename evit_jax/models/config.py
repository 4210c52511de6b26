"""What decides a vision transformer's parameters, and from it how many these are and what an image costs."""

import dataclasses
import math

from evit_jax.models.dynamicvit import predictor_macs, predictor_parameters
from evit_jax.models.layers import ACTIVATIONS, Convolution
from evit_jax.reduction.plan import TokenPlan, block_macs, block_parameters, blocks_macs

POOLINGS = {
    'token': 'the last norm, then the prefix tokens',
    'avg': "the last norm, then the mean of the patch tokens (timm's global_pool='avg' with fc_norm=False)",
    'avg_fc_norm': "the mean of the patch tokens, then a norm (timm's global_pool='avg', as MAE is fine-tuned)"}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Everything that decides a ViT's parameters, and the logits that they give."""

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
    norm_epsilon: float = 1e-6  # of the blocks' norms and the last one
    qkv_bias: bool = True
    residual_scale: float = 1.0  # of what attention and MLP add
    predictors: int = 0       # reductions, from the first on, that ask a predictor of their own (DynamicViT)
    activation: str = 'gelu'  # in the MLPs: one of layers.ACTIVATIONS
    pooling: str = 'token'    # the input of the head: one of POOLINGS
    one_head: bool = False    # a distilled model whose class token alone has a head

    def __post_init__(self):
        self.patches(self.image_size)
        self._check_values()
        strides = math.prod(convolution.stride for convolution in self.convolutions)
        if self.stem and strides != self.patch_size:
            raise ValueError(f'a stem of {len(self.stem)} convolutions makes patches of {strides}, not '
                             f'{self.patch_size}: patch_size must be a power of 2, and the stem as long as that power')

    def _check_values(self):
        """Raises a ValueError where a value that has no array shape is out of range."""
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
        """The stem: of stride 2 until a patch is one pixel, then 1, which widens what a token sees."""
        halvings = int(math.log2(self.patch_size))
        return tuple(Convolution(3, 2 if number < halvings else 1, *channels)
                     for number, channels in enumerate(zip((3, *self.stem), self.stem)))

    @property
    def patch_side(self) -> int:
        """Side of a patch in pixels of what the stem makes of the image."""
        return self.patch_size // math.prod(convolution.stride for convolution in self.convolutions)

    @property
    def patch_values(self) -> int:
        """Numbers in a patch of what the stem makes of the image."""
        return self.patch_side**2 * (self.convolutions[-1].channels_out if self.convolutions else 3)

    @property
    def classifiers(self) -> int:
        """Heads that tell classes: one for each prefix token."""
        return 1 if self.one_head else self.prefix

    @property
    def has_token_head(self) -> bool:
        """True where a second head classifies each patch token."""
        return False

    @property
    def head_reads_patches(self) -> bool:
        """Whether the heads read every token that leaves the last block; else those of the prefix alone."""
        return self.has_token_head or self.pooling != 'token'

    @property
    def default_reduce_at(self) -> tuple[int, ...]:
        """The blocks that reduce where nothing else is said: at a quarter, half and three quarters of the depth."""
        return tuple(dict.fromkeys(self.depth * quarter // 4 for quarter in (1, 2, 3)))

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

    def check_plan(self, plan: TokenPlan) -> None:
        """Raises a ValueError where a plan asks for predictors that the model does not have."""
        asked = len(plan.reductions) if plan.reducer.predicts else 0
        if asked > self.predictors:
            has = f'{self.predictors or "no"} predictor{"s" * (self.predictors != 1)}'
            raise ValueError(
                f'{plan.reducer} asks a trained predictor in front of each of the blocks {plan.reductions}, and this '
                f'model has {has}: train one with config.reducer.name={plan.reducer} and as many blocks in '
                f'config.model.reduce_at, or choose another reducer' + ' or fewer reductions' * bool(self.predictors))

    def macs(self, plan: TokenPlan) -> int:
        """Multiply-accumulates of one image under a plan, as the papers count them: every block is whole."""
        side, stem = math.isqrt(plan.patches) * self.patch_size, 0
        for convolution in self.convolutions:
            side //= convolution.stride
            stem += side * side * convolution.weights
        heads = self.classified(plan) * self.width * self.classes
        blocks = blocks_macs(plan, width=self.width, mlp_ratio=self.mlp_ratio, prefix=self.prefix)
        if plan.reducer.predicts:
            blocks += sum(predictor_macs(plan.entering[block], self.width) for block in plan.reductions)
        return stem + plan.patches * self.patch_values * self.width + blocks + heads

    def executed_macs(self, plan: TokenPlan) -> int:
        """Those that the logits of one image take: where the heads read the prefix alone, the last block is short."""
        if self.head_reads_patches or not self.depth:
            return self.macs(plan)
        tokens = plan.attending[-1] + self.prefix
        whole, short = (block_macs(tokens, leaving, self.width, self.mlp_ratio, rows) for leaving, rows in (
            (plan.counts[-1] + self.prefix, None), (self.prefix, self.prefix)))
        return self.macs(plan) - whole + short

    def classified(self, plan: TokenPlan) -> int:
        """Vectors that a head is applied to; the mean of the patch tokens is one."""
        return 1 if self.one_head else self.prefix + self.has_token_head * plan.counts[-1]

    def parameters(self) -> int:
        """Number of parameters."""
        stem = sum(convolution.weights + 2 * convolution.channels_out for convolution in self.convolutions)
        tokens = self.prefix + self.prefix + self.patches(self.image_size)  # prefix tokens, and positions of all
        heads = self.classifiers * (self.width + 1) * self.classes
        blocks = self.depth * block_parameters(self.width, self.mlp_ratio, self.qkv_bias)
        blocks += self.predictors * predictor_parameters(self.width)
        return stem + (self.patch_values + 1 + tokens + 2) * self.width + blocks + heads
