"""Weights of PyTorch programs to this one's, and back: python -m evit_jax.convert deit_small.pth weights/deit_s
                                                    python -m evit_jax.convert vit-base-patch16-224/ weights/vit_b
                                                    python -m evit_jax.convert runs/mine mine.safetensors --ema

SRC is a file (.pth, .pt, .safetensors) with a DeiT or ViT as timm, DeiT, EViT, DynamicViT or Hugging Face name its
weights, or an LV-ViT as its authors do; or a folder of Hugging Face or timm (config.json, model.safetensors or its
shards). DST is made, a folder to give to --config.init_from, to --mode evaluate, or to predict. PyTorch is not needed,
and nothing that a file holds is run. Values that no array shows (heads, epsilon, activation, pooling, mean, std, crop)
are read from the file and the configs beside it; one WARNING lists those that are assumed. Or SRC is the workdir of a
run, and DST a file (.safetensors) for timm, or for the authors' DynamicViT or LV-ViT.
"""

import math

from absl import flags

from evit_jax import cli
from evit_jax.checkpoints import workdir
from evit_jax.interchange import conversion
from evit_jax.models.config import POOLINGS
from evit_jax.models.layers import ACTIVATIONS
from evit_jax.runtime import backend, storage

_EMA = flags.DEFINE_bool('ema', False, 'Take the moving average of the weights.')
_IMAGE_SIZE = flags.DEFINE_integer('image_size', None, 'Resize the position embeddings for images of this size.',
                                   lower_bound=1)
_KEY = flags.DEFINE_string('key', '', 'Dict in the file, or prefix of names, that holds the weights, as teacher, '
                           'state_dict.model or module.base_encoder: where there are several models.')
_CLASS_NAMES = flags.DEFINE_string('class_names', None, 'File of the names of the classes, one in a line.')
_ALLOW_MISSING = flags.DEFINE_multi_string(
    'allow_missing', [], "Pattern of a head's weights that may be missing and get random values, as 'head.*': timm's "
    'names.')
_ALLOW_EXTRA = flags.DEFINE_multi_string(
    'allow_extra', [], "Pattern, as '*pooler*', of weights that are left out if the model has none such; not of those "
    'that every image goes through.')
_HEADS = flags.DEFINE_integer('heads', None, 'Number of attention heads.')
_NORM_EPSILON = flags.DEFINE_float('norm_epsilon', None, "Epsilon of the layer norms; Hugging Face's ViT has 1e-12.")
_ACTIVATION = flags.DEFINE_enum('activation', None, list(ACTIVATIONS), 'Activation of the MLPs.')
_POOLING = flags.DEFINE_enum('pooling', None, list(POOLINGS), "Input of the head: the class token, or the mean of the "
                             'patch tokens after the last norm, or before it (fc_norm).')
_MEAN = flags.DEFINE_list('mean', None, 'Mean of the channels that images are normalised with, in 0..1.')
_STD = flags.DEFINE_list('std', None, 'Standard deviation of the channels, likewise.')
_CROP = flags.DEFINE_float('crop', None, "Side of the centre crop in evaluation, as a share of the image's short side "
                           "(timm's crop_pct); 0 squeezes the whole image to a square.")
_INWARD = (_KEY, _CLASS_NAMES, _ALLOW_MISSING, _ALLOW_EXTRA, _HEADS, _NORM_EPSILON, _ACTIVATION, _POOLING, _MEAN, _STD,
           _CROP)


def main(src: str, dst: str) -> None:
    """Converts one way or the other, by what SRC is."""
    backend.start()
    if not _is_run(src):
        values = {flag.name: flag.value for flag in (_HEADS, _NORM_EPSILON, _ACTIVATION, _POOLING, _CROP)}
        conversion.from_file(src, dst, ema=_EMA.value, key=_KEY.value, image_size=_IMAGE_SIZE.value,
                             class_names=_CLASS_NAMES.value, allow_missing=_ALLOW_MISSING.value,
                             allow_extra=_ALLOW_EXTRA.value, mean=_channels(_MEAN), std=_channels(_STD), **values)
        return
    if given := [flag.name for flag in _INWARD if flag.value not in (None, '', [])]:
        raise ValueError(f'--{given[0]} is for files that come in, and {src} is a run: leave it out')
    conversion.to_file(src, dst, ema=_EMA.value, image_size=_IMAGE_SIZE.value)


def _is_run(src):
    """True for the workdir of a run. A folder of Hugging Face has a config.json, too."""
    if storage.is_remote(src):
        return True
    if not storage.as_path(src).is_dir():
        return False
    config = workdir.saved_config(src)
    return config is not None and 'model.name' in config


def _channels(flag):
    try:
        values = tuple(map(float, flag.value or ()))
    except ValueError:
        values = (0,)
    if len(values) not in (0, 3) or not all(map(math.isfinite, values)) or (flag is _STD and any(
            value <= 0 for value in values)):
        raise ValueError(f'--{flag.name} must be three numbers{", none of them 0 or less" if flag is _STD else ""}, as '
                         f'0.5,0.5,0.5, and not {",".join(flag.value)}')
    return values


if __name__ == '__main__':
    cli.run(main, 'SRC', 'DST')
