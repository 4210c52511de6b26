"""Converts weights of PyTorch programs to a workdir, and a run to safetensors.

    python -m evit_jax.convert deit_small.pth weights/deit_s
    python -m evit_jax.convert vit-base-patch16-224/ weights/vit_b
    python -m evit_jax.convert runs/mine mine.safetensors --ema

SRC is one of:
- a file (.pth, .pt, .safetensors) with a vision transformer in the layout of timm, DeiT, DINOv2, EViT, DynamicViT or
  Hugging Face, or with an LV-ViT in the layout of its authors. DST is a new folder.
- a Hugging Face or timm folder: config.json with model.safetensors, pytorch_model.bin, or their shards. DST is a new
  folder.
- a model of the Hugging Face Hub: hf-hub:ORG/NAME[@REVISION], or timm/NAME for hf-hub:timm/NAME. DST is a new folder.
- the workdir of a run. DST is a .safetensors file for timm, or for the code of DynamicViT's or LV-ViT's authors.

Names and shapes of the arrays determine the architecture: ViT, DeiT, DeiT-III, MAE, DINO, DINOv2, DINOv3, CLIP, SigLIP
and EVA-02 of any size. Some hyperparameters cannot be inferred from array shapes, such as heads, epsilon, activation,
pooling, rotary positions, mean, std and crop. They are read from the file and from configs in its folder. One WARNING
lists the values that are assumed.

Use the new folder with --config.init_from, --mode evaluate, or predict. PyTorch is not needed, and no code in a file is
executed. --check compares the outputs with those of timm or transformers, if they are installed.
"""

import math

from absl import flags

from evit_jax import cli
from evit_jax.checkpoints import workdir
from evit_jax.interchange import conversion
from evit_jax.kernels.activations import ACTIVATIONS
from evit_jax.models.config import POOLINGS, ROPES, parse_size
from evit_jax.models.positions import POSITION_RESIZES
from evit_jax.runtime import backend, storage

_EMA = flags.DEFINE_bool('ema', False, 'Convert the moving average of the weights.')
_IMAGE_SIZE = flags.DEFINE_string('image_size', None, 'Resize the position embeddings for images of this size: a side, '
                                  'or HEIGHTxWIDTH, such as 224 or 224x112.')
_CHECK = flags.DEFINE_bool('check', False, 'Compare the outputs with those of timm or transformers before writing, and '
                           'fail if they differ by more than 1e-3 of the largest.')
_KEY = flags.DEFINE_string('key', '', 'Name of the dict in the file, or prefix of the array names, that holds the '
                           'weights, such as teacher, state_dict.model or module.base_encoder. Required if a file '
                           'holds several models.')
_CLASS_NAMES = flags.DEFINE_string('class_names', None, 'Text file with one class name per line.')
_ALLOW_MISSING = flags.DEFINE_multi_string(
    'allow_missing', [], "Pattern of timm's array names, such as 'head.*'. Matching arrays of a head may be missing; "
    'they get random values.')
_ALLOW_EXTRA = flags.DEFINE_multi_string(
    'allow_extra', [], "Pattern of timm's array names, such as '*pooler*'. Matching arrays are skipped if the model "
    'has no array of that name. Arrays of the backbone cannot be skipped.')
_HEADS = flags.DEFINE_integer('heads', None, 'Number of attention heads.')
_NORM_EPSILON = flags.DEFINE_float('norm_epsilon', None, "Epsilon of the layer norms. Hugging Face's ViT has 1e-12.")
_ACTIVATION = flags.DEFINE_enum('activation', None, list(ACTIVATIONS), 'Activation of the MLPs.')
_POOLING = flags.DEFINE_enum('pooling', None, list(POOLINGS), 'Input of the head: the class token (token), the mean of '
                             'the patch tokens after the last norm (avg) or before it (avg_fc_norm), class token and '
                             'mean (token_avg), or an attention pool (map).')
_ROPE = flags.DEFINE_enum('rope', None, [name for name in ROPES if name], 'Rotary position embeddings.')
_ROPE_BASE = flags.DEFINE_float('rope_base', None, 'Base (temperature) of the rotary frequencies.')
_ROPE_GRID = flags.DEFINE_integer('rope_grid', None, "Side of the grid of patches in EVA-02's pretraining.")
_POSITION_RESIZE = flags.DEFINE_enum('position_resize', None, list(POSITION_RESIZES), 'Resize of the position '
                                     'embeddings for other image sizes.')
_MEAN = flags.DEFINE_list('mean', None, 'Mean of each channel for the normalisation of images, in 0..1.')
_STD = flags.DEFINE_list('std', None, 'Standard deviation of each channel, in 0..1.')
_CROP = flags.DEFINE_float('crop', None, "Side of the centre crop in evaluation, as a fraction of the image's short "
                           "side (timm's crop_pct). 0 squeezes the whole image to a square.")
_VALUES = (_HEADS, _NORM_EPSILON, _ACTIVATION, _POOLING, _ROPE, _ROPE_BASE, _ROPE_GRID, _POSITION_RESIZE, _CROP)
_IMPORT_FLAGS = (_KEY, _CLASS_NAMES, _ALLOW_MISSING, _ALLOW_EXTRA, _MEAN, _STD, _CHECK, *_VALUES)


def main(src: str, dst: str) -> None:
    """Converts a run to a safetensors file, and other models to a workdir."""
    backend.start()
    image_size = None if _IMAGE_SIZE.value is None else parse_size(_IMAGE_SIZE.value, 'image_size')
    if not _is_run(src):
        conversion.to_workdir(src, dst, check=_CHECK.value, ema=_EMA.value, key=_KEY.value, image_size=image_size,
                              class_names=_CLASS_NAMES.value, allow_missing=_ALLOW_MISSING.value,
                              allow_extra=_ALLOW_EXTRA.value, mean=_channels(_MEAN), std=_channels(_STD),
                              **{flag.name: flag.value for flag in _VALUES})
        return
    if given := [flag.name for flag in _IMPORT_FLAGS if flag.value not in (None, '', [], False)]:
        raise ValueError(f'--{given[0]} applies to files of other programs, and {src} is a run: leave it out')
    conversion.to_safetensors(src, dst, ema=_EMA.value, image_size=image_size)


def _is_run(src):
    """Returns True for the workdir of a run. The config.json of a Hugging Face folder has no model.name."""
    if storage.is_remote(src):
        return True
    if not storage.as_path(src).is_dir():
        return False
    config = workdir.saved_config(src)
    return config is not None and 'model.name' in config


def _channels(flag):
    """Returns the three numbers in a flag, or () if the flag is not given."""
    try:
        values = tuple(map(float, flag.value or ()))
    except ValueError:
        values = (0,)
    if len(values) not in (0, 3) or not all(map(math.isfinite, values)) or (flag is _STD and any(
            value <= 0 for value in values)):
        raise ValueError(f'--{flag.name} must be three {"positive " if flag is _STD else ""}numbers, such as '
                         f'0.5,0.5,0.5, and not {",".join(flag.value)}')
    return values


if __name__ == '__main__':
    cli.run(main, 'SRC', 'DST')
