"""The config of a vision transformer."""

import dataclasses
import math
from collections.abc import Sequence

from evit_jax.kernels.activations import ACTIVATIONS
from evit_jax.models import costs
from evit_jax.models.embedding import Convolution
from evit_jax.models.positions import POSITION_RESIZES
from evit_jax.reduction.plan import TokenPlan

POOLINGS = {
    'token': 'the last norm, then the prefix tokens',
    'avg': "the last norm, then the mean of the patch tokens (timm's global_pool='avg' with fc_norm=False)",
    'avg_fc_norm': "the mean of the patch tokens, then a norm (timm's global_pool='avg', as MAE is fine-tuned)",
    'token_avg': 'the last norm, then the class token and the mean of the patch tokens side by side (DINOv2)',
    'map': "the last norm, then attention of a learned query (timm's global_pool='map', SigLIP)"}
ROPES = {
    '': 'no rotary position embedding',
    'eva': "EVA-02: coordinates are grid indices, and pairs of neighbouring channels rotate (timm's rope_type='cat')",
    'dinov3': 'DINOv3: coordinates of patch centres in [-1, 1] times 2 pi; channel i rotates with channel i + d / 2'}
ImageSize = int | tuple[int, int]  # side of a square, or (height, width), in pixels


def as_hw(image_size: ImageSize) -> tuple[int, int]:
    """Returns (height, width) of an image size."""
    return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)


def as_size(height_width: Sequence[int]) -> ImageSize:
    """Returns the image size of (height, width): an int if they are equal."""
    height, width = height_width
    return height if height == width else (height, width)


def size_text(image_size: ImageSize) -> str:
    """Formats an image size: 224, or 224x112 for (height, width)."""
    return str(image_size) if isinstance(image_size, int) else 'x'.join(map(str, image_size))


def parse_size(text: str, flag: str) -> ImageSize:
    """Returns the image size of a text in the format of `size_text`.

    Args:
      flag: flag that holds the text, for the error message.

    Raises:
      ValueError: the text is neither a side nor HEIGHTxWIDTH.
    """
    sides = text.lower().split('x')
    if len(sides) > 2 or not all(side.isdecimal() and 0 < int(side) < 1e5 for side in sides):
        raise ValueError(f'--{flag}={text} must be a side or HEIGHTxWIDTH in pixels, such as 224 or 224x112')
    return as_size([int(side) for side in (sides * 2)[:2]])


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """All values that determine a ViT's parameters and how it computes logits."""

    image_size: ImageSize = 224  # images of the position embeddings: side, or (height, width), in pixels
    patch_size: int = 16
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    classes: int = 1000       # outputs of the head; 0: no head, the logits are the features
    distilled: bool = False   # adds a distillation token with its own head
    init_std: float = 0.02    # standard deviation of the blocks' initial weights; narrow models need a larger one
    stem: tuple[int, ...] = ()  # channels of the 3x3 convolutions, each with a norm; (): no stem
    norm_epsilon: float = 1e-6  # epsilon of all layer norms
    qkv_bias: bool = True
    residual_scale: float = 1.0  # scale of the attention and MLP branches
    activation: str = 'gelu'  # activation of the MLPs: a key of kernels.activations.ACTIVATIONS
    pooling: str = 'token'    # input of the head; one of POOLINGS
    one_head: bool = False    # True: a distilled model in which only the class token has a head
    class_token: bool = True
    registers: int = 0        # number of register tokens; they follow the class and distillation tokens
    prefix_positions: int | None = None  # number of first prefix tokens with a position embedding; None: all
    absolute_positions: bool = True      # adds a learned position embedding to the tokens
    position_resize: str = 'bicubic'     # resize of the position embeddings to other grids; one of POSITION_RESIZES
    rope: str = ''            # rotary position embedding; one of ROPES
    rope_base: float = 10000.0  # base (temperature) of the rotary frequencies
    rope_grid: int = 0        # eva: side of the grid whose coordinates other grids are scaled to; 0: no scaling
    layer_scale: float = 0.0  # initial value of LayerScale; 0: no LayerScale
    qk_norm: bool = False     # layer norms of the queries and keys of each head
    k_bias: bool = True       # False: if qkv_bias, only queries and values have a bias
    pre_norm: bool = False    # a norm between the embedding and the first block (CLIP)
    patch_bias: bool = True   # bias of the patch projection
    swiglu: bool = False      # gated MLP: fc2(activation(gate) * value); fc1 computes gate and value
    mlp_norm: bool = False    # swiglu: a norm before fc2
    projection: bool = False  # True: the outputs of the head are an embedding (CLIP), not logits of classes
    head_bias: bool = True

    def __post_init__(self):
        if not isinstance(self.image_size, int):
            object.__setattr__(self, 'image_size', as_size(self.image_size))
        self.grid(self.image_size)
        self._check_values()
        self._check_tokens()
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
        for key, value, known in (('activation', self.activation, ACTIVATIONS), ('pooling', self.pooling, POOLINGS),
                                  ('position_resize', self.position_resize, POSITION_RESIZES),
                                  ('rope', self.rope, ROPES)):
            if value not in known:
                raise ValueError(f'{key}={value!r} is unknown: there are {", ".join(filter(None, known))}')
        if self.rope and self.width // self.heads % 4:
            raise ValueError(f'rope={self.rope!r} needs a multiple of 4 channels in each head, and {self.heads} heads '
                             f'of a width of {self.width} have {self.width // self.heads}: give another number')
        if self.mlp_norm and not self.swiglu:
            raise ValueError('mlp_norm=True is for a gated MLP: give swiglu=True, or mlp_norm=False')

    def _check_tokens(self):
        """Raises a ValueError if prefix tokens, pooling and heads contradict each other."""
        if self.distilled and self.pooling != 'token':
            raise ValueError(f'pooling={self.pooling} reads no distillation token: give pooling=token, or '
                             'distilled=False')
        if self.one_head and not self.distilled:
            raise ValueError('one_head=True is for a model with a distillation token: give distilled=True, or '
                             'one_head=False')
        if not self.class_token and (self.distilled or self.pooling in ('token', 'token_avg')):
            raise ValueError(f'a model without a class token cannot have pooling={self.pooling} and '
                             f'distilled={self.distilled}: give pooling=avg, avg_fc_norm or map, and distilled=False')
        if not 0 <= self.num_prefix_positions <= self.num_prefix_tokens:
            raise ValueError(f'prefix_positions={self.prefix_positions} is outside [0, {self.num_prefix_tokens}], the '
                             'number of prefix tokens: give None for all of them')

    @property
    def has_classes(self) -> bool:
        """True if the outputs of the model are logits of classes; False if they are features or an embedding."""
        return bool(self.classes) and not self.projection

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
        """Number of classification heads: one for the pooled tokens, and one for a distillation token."""
        return 1 + self.has_dist_head

    @property
    def has_dist_head(self) -> bool:
        """True if the distillation token has a head."""
        return self.distilled and not self.one_head and self.classes > 0

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
        """Number of prefix tokens: class token, distillation token and registers."""
        return self.class_token + self.distilled + self.registers

    @property
    def num_prefix_positions(self) -> int:
        """Number of first prefix tokens that have a position embedding."""
        return self.num_prefix_tokens if self.prefix_positions is None else self.prefix_positions

    @property
    def mlp_hidden(self) -> int:
        """Number of hidden channels of the MLP; for a gated MLP, of its gate and of its value."""
        return round(self.width * self.mlp_ratio)

    @property
    def head_width(self) -> int:
        """Number of features that the head reads."""
        return self.width * (2 if self.pooling == 'token_avg' else 1)

    def check_reducer(self, plan: TokenPlan) -> None:
        """Raises a ValueError if the reducer of a plan ranks tokens by an attention pool that the model lacks."""
        if plan.reductions and plan.reducer.importance == 'pool' and self.pooling != 'map':
            base = plan.reducer.name.partition(':')[0]
            raise ValueError(f'reducer {plan.reducer} ranks tokens by the attention pool of the model, and this model '
                             f'has pooling={self.pooling}, not map: give {base}:mean or {base}')

    def grid(self, image_size: ImageSize | None = None) -> tuple[int, int]:
        """Returns the number of rows and columns of patches of an image; by default of `self.image_size`.

        Raises:
          ValueError: height or width is not a multiple of the patch size.
        """
        image_size = self.image_size if image_size is None else as_size(as_hw(image_size))
        for side in as_hw(image_size):
            if side < self.patch_size or side % self.patch_size:
                below = side // self.patch_size * self.patch_size
                near = ' or '.join(str(size) for size in (below, below + self.patch_size) if size)
                of_image = '' if isinstance(image_size, int) else f' in {image_size[0]} x {image_size[1]}'
                raise ValueError(f'image size {side}{of_image} is not divisible by the patch size {self.patch_size}: '
                                 f'use {near}')
        height, width = as_hw(image_size)
        return height // self.patch_size, width // self.patch_size

    def patches(self, image_size: ImageSize) -> int:
        """Returns the number of patches of an image.

        Raises:
          ValueError: height or width is not a multiple of the patch size.
        """
        return math.prod(self.grid(image_size))

    def num_classified(self, plan: TokenPlan) -> int:
        """Number of vectors to which classification heads are applied."""
        return 1 + self.has_dist_head + self.has_token_head * plan.counts[-1]

    def macs(self, plan: TokenPlan) -> int:
        """Multiply-accumulates of one image under a plan; see `costs.macs`."""
        return costs.macs(self, plan)

    def executed_macs(self, plan: TokenPlan) -> int:
        """Multiply-accumulates needed to compute the logits of one image; see `costs.executed_macs`."""
        return costs.executed_macs(self, plan)

    def parameters(self, plan: TokenPlan | None = None) -> int:
        """Number of parameters; see `costs.parameters`."""
        return costs.parameters(self, plan)
