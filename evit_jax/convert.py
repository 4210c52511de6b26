"""Weights of PyTorch programs to this one's, and back: python -m evit_jax.convert deit_small.pth weights/deit_s
                                                    python -m evit_jax.convert runs/mine mine.safetensors --ema

SRC is a file (.pth, .pt, .safetensors) with a DeiT or ViT as timm, DeiT, EViT, DynamicViT or Hugging Face name its
weights, or an LV-ViT as its authors do; DST is made, a folder to give to --config.init_from, to --mode evaluate, or to
predict. PyTorch is not needed, and nothing that a file holds is run. Or SRC is the workdir of a run, and DST a file
(.safetensors) for timm, or for the authors' DynamicViT or LV-ViT.
"""

from absl import flags

from evit_jax import backend, commandline
from evit_jax.interchange import conversion
from evit_jax.training import storage

_EMA = flags.DEFINE_bool('ema', False, 'Take the moving average of the weights.')
_RESIZE = flags.DEFINE_integer('resize', None, 'Resize the position embeddings for images of this size.',
                               lower_bound=1)
_CLASS_NAMES = flags.DEFINE_string('class_names', None, 'File of the names of the classes, one in a line.')
_ALLOW_MISSING = flags.DEFINE_multi_string(
    'allow_missing', [], "Pattern of weights that may be missing and get initial values, as 'head.*': timm's names.")
_ALLOW_EXTRA = flags.DEFINE_multi_string(
    'allow_extra', [], "Pattern, as 'fc_norm.*', of weights that are left out if the model has none such.")
_MEAN = flags.DEFINE_list('mean', None, "Of the channels, that images are normalised with; ImageNet's if not given. "
                          'Weights named vit, unlike deit, often want 0.5,0.5,0.5 here and for std.')
_STD = flags.DEFINE_list('std', None, 'As mean.')


def main(src: str, dst: str) -> None:
    """Converts one way or the other, by what SRC is."""
    backend.start()
    inward = not storage.place(src).is_dir()
    given = [flag.name for flag in (_CLASS_NAMES, _ALLOW_MISSING, _ALLOW_EXTRA, _MEAN, _STD) if flag.value]
    if given and not inward:
        raise ValueError(f'--{given[0]} is for files that come in, and {src} is a folder: leave it out')
    if inward:
        conversion.from_file(src, dst, ema=_EMA.value, resize=_RESIZE.value, class_names=_CLASS_NAMES.value,
                             allow_missing=_ALLOW_MISSING.value, allow_extra=_ALLOW_EXTRA.value,
                             mean=_channels(_MEAN), std=_channels(_STD))
    else:
        conversion.to_file(src, dst, ema=_EMA.value, resize=_RESIZE.value)


def _channels(flag):
    try:
        values = tuple(map(float, flag.value or ()))
    except ValueError:
        values = (0,)
    if len(values) not in (0, 3) or (flag is _STD and 0 in values):
        raise ValueError(f'--{flag.name} must be three numbers{", none of them 0" if flag is _STD else ""}, as '
                         f'0.5,0.5,0.5, and not {",".join(flag.value)}')
    return values


if __name__ == '__main__':
    commandline.run(main, 'SRC', 'DST')
