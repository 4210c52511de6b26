"""Exports a trained model for serving: python -m evit_jax.export runs/digits served/digits --rates=0.5,0.7,1.0

CHECKPOINT is the folder of a run, its `best` folder, a folder that holds only weights, a file or folder of another
program (.pth, .safetensors, Hugging Face, timm), or hf-hub:ORG/NAME. DIR is a new folder. It contains
- a StableHLO program for each token plan, which runs on CPUs, GPUs and TPUs with any batch size;
- the weights, which all programs share;
- a manifest with sizes, class names and checksums;
- a loader that needs jax and Pillow, but not this package;
- a README.

The export runs each program, and compares its outputs with those of the model. DIR is created only when it is
complete. A killed export leaves DIR.unfinished-..., which the next export to DIR removes.

If --format=orbax, DIR is a checkpoint of the weights and the config, without the state of the optimizer. Use it like
the folder of a run, in predict, --mode evaluate or --config.init_from; or read it with Orbax.

If --format=onnx, DIR contains an ONNX file for each token plan, with any batch size, and one file of weights that they
share; a manifest and a README. ONNX Runtime, OpenVINO and TensorRT read the files. It needs the extra [onnx]; with
[onnxruntime], the export compares each file with the model.
"""

import pathlib

import jax
import numpy as np
from absl import flags, logging

from evit_jax import cli
from evit_jax.checkpoints import weights
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.checkpoints.manager import read_metadata
from evit_jax.data.names import in_one_line
from evit_jax.interchange.opening import open_model
from evit_jax.models.config import parse_size
from evit_jax.reduction.plan import TokenPlan
from evit_jax.reduction.plan_file import read_plan_file
from evit_jax.reduction.registry import list_reducers
from evit_jax.runtime import backend, storage
from evit_jax.serving import artifact, manifest, onnx_artifact

_RATES = flags.DEFINE_list('rates', [], 'Keep rates, in (0, 1]. One plan is exported for each rate; every reduction '
                           'keeps this fraction of its tokens.')
_TOKENS = flags.DEFINE_multi_string('tokens', [], 'Number of tokens that each reduction of a plan keeps, such as '
                                    '137,96,67; may be repeated. If --rates, --tokens, --r and --plan are not given, '
                                    'the plan of training is exported. The plan of training is the default plan; if it '
                                    'is not exported, the first plan is.')
_R = flags.DEFINE_list('r', [], 'Numbers of tokens to merge in every block; only for a reducer that merges. One plan '
                       'is exported for each number. Hyphens join the numbers of all blocks: 8,39-31-24 means two '
                       'plans.')
_PLANS = flags.DEFINE_multi_string('plan', [], 'Plan file of python -m evit_jax.plan; may be repeated. The plan has '
                                   'the name of the file.')
_REDUCER = flags.DEFINE_string('reducer', None, 'Method that reduces the tokens; default: as in training. One of '
                               f'{", ".join(list_reducers())}.')
_PLATFORMS = flags.DEFINE_list('platforms', ['cpu', 'cuda', 'tpu'], 'Platforms that the programs run on: '
                               f'{", ".join(artifact.PLATFORMS)}.')
_KEPT = flags.DEFINE_bool('kept', False, 'The programs also return, for each reduction, the indices of the patches '
                          'that it keeps, the token of each patch, and the class attention.')
_DTYPE = flags.DEFINE_enum('dtype', None, sorted({*artifact.TOLERANCE, *onnx_artifact.TOLERANCE}), 'Dtype of the '
                           'computation; default: as in training, with --format=onnx float32.')
_INPUT_DTYPE = flags.DEFINE_enum('input_dtype', 'uint8', onnx_artifact.INPUT_DTYPES, 'Dtype of the images of '
                                 '--format=onnx, with values from 0 to 255.')
_IMAGE_SIZE = flags.DEFINE_string('image_size', None, 'Side of the images, or HEIGHTxWIDTH, in pixels; default: as in '
                                  'training. Position embeddings are resized.')
flags.DEFINE_alias('image-size', 'image_size')
_EMA = flags.DEFINE_bool('ema', False, 'Export the moving average of the weights.')
_FORMAT = flags.DEFINE_enum('format', 'stablehlo', ['stablehlo', 'onnx', 'orbax'], 'Format of DIR.')
_PROGRAM_FLAGS = _RATES, _TOKENS, _R, _PLANS, _REDUCER, _PLATFORMS, _KEPT, _DTYPE, _INPUT_DTYPE, _IMAGE_SIZE
_ONLY = {'onnx': (_INPUT_DTYPE,), 'stablehlo': (_PLATFORMS,)}  # flags of one format


def main(checkpoint: str, dst: str) -> None:
    """Exports a checkpoint to a new folder."""
    backend.start()
    if storage.is_remote(dst):
        raise ValueError(f'{dst} is not a local folder: export to a local folder, then copy it')
    folder = pathlib.Path(dst).expanduser().absolute()
    if folder.is_symlink() or folder.exists():
        raise ValueError(f'{dst} exists, and is not overwritten: give another DIR')
    plan_arguments, platforms = _plan_arguments(), _platforms()
    _check_format()
    trained = _at_image_size(open_model(checkpoint, ema=_EMA.value).with_reducer(_REDUCER.value))
    logging.info('%s, step %d of %s', trained.name, trained.step, checkpoint)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(trained.params))
    if _FORMAT.value == 'orbax':
        with storage.new_folder(folder, num_bytes) as unfinished:
            _write_orbax(unfinished, trained)
    else:
        trained = (onnx_artifact.with_dtype(trained, _DTYPE.value) if _FORMAT.value == 'onnx'
                   else trained._replace(dtype=_DTYPE.value or trained.dtype))
        plans = {name: trained.plan(**arguments) for name, arguments in plan_arguments.items()}
        default = manifest.default_plan(trained, plans)
        if plans[default] != manifest.plan_of_training(trained):
            logging.warning('the plan of training is not among those requested: %s is the default', default)
        with storage.new_folder(folder, num_bytes) as unfinished:
            if _FORMAT.value == 'onnx':
                onnx_artifact.write(unfinished, trained, plans, input_dtype=_INPUT_DTYPE.value, kept=_KEPT.value,
                                    ema=_EMA.value)
            else:
                artifact.write(unfinished, trained, plans, platforms=platforms, kept=_KEPT.value, ema=_EMA.value)
                _check(unfinished, trained, plans, platforms)
    logging.info('%s is written', dst)


def _at_image_size(trained: LoadedModel) -> LoadedModel:
    """Returns the model for images of --image_size."""
    if _IMAGE_SIZE.value is None:
        return trained
    image_size = parse_size(_IMAGE_SIZE.value, 'image_size')
    trained.config.patches(image_size)  # a size that is no multiple of the patch size is an error
    return trained._replace(image_size=image_size)


def _check_format() -> None:
    """Raises a ValueError if a flag does not apply to the format, or a package of the format is missing."""
    if _FORMAT.value == 'orbax' and (given := [flag.name for flag in _PROGRAM_FLAGS if flag.present]):
        raise ValueError(f'--{given[0]} applies to programs, and a checkpoint holds none: leave it out')
    if other := [flag.name for name, own in _ONLY.items() for flag in own if name != _FORMAT.value and flag.present]:
        raise ValueError(f'--{other[0]} does not apply to --format={_FORMAT.value}: leave it out')
    if _FORMAT.value == 'onnx':
        onnx_artifact.check_requirements()
    elif _DTYPE.value and _DTYPE.value not in artifact.TOLERANCE:
        raise ValueError(f'--dtype={_DTYPE.value} is for --format=onnx: give {" or ".join(artifact.TOLERANCE)}')


def _plan_arguments() -> dict[str, dict]:
    """Returns a dict from the name of each requested plan to its keyword arguments for `LoadedModel.plan`."""
    counts = [cli.numbers('tokens', text.split(','), int) for text in _TOKENS.value]
    requested = [(str(rate), '--rates', {'keep_rate': rate}) for rate in cli.numbers('rates', _RATES.value, float)]
    requested += [('-'.join(map(str, tokens)), '--tokens', {'tokens': tokens}) for tokens in counts]
    requested += [(f'r{text}', '--r', {'r': r}) for text, r in zip(_R.value, cli.merge_counts('r', _R.value))]
    requested += [(in_one_line(pathlib.Path(file).stem), f'--plan={in_one_line(file)}',
                   {'plan': read_plan_file(file)}) for file in _PLANS.value]
    origins = {}
    for name, origin, _ in requested:
        if origins.setdefault(name, origin) != origin:
            raise ValueError(f'{origins[name]} and {origin} give two plans the name {name}: rename a file')
    names = [name for name, *_ in requested]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f'the plan {repeated[0]} is given twice: give each plan once')
    return {name: arguments for name, _, arguments in requested} or {'trained': {}}


def _platforms() -> tuple[str, ...]:
    known = artifact.PLATFORMS
    if unknown := [name for name in _PLATFORMS.value if name not in known]:
        raise ValueError(f'--platforms: {unknown[0]!r} is unknown, there are {", ".join(known)}')
    if not _PLATFORMS.value:
        raise ValueError(f'--platforms is empty: give some of {", ".join(known)}')
    return tuple(dict.fromkeys(_PLATFORMS.value))


def _check(folder: pathlib.Path, trained: LoadedModel, plans: dict[str, TokenPlan], platforms: tuple[str, ...]) -> None:
    """Compares the exported programs with the model, if they support the platform of this machine."""
    platform = jax.export.default_export_platform()
    if platform not in platforms:
        logging.warning('the programs were not run: they are for %s, and this machine computes on %s',
                        ', '.join(platforms), platform)
        return
    for name, difference in artifact.check(folder, trained, plans):
        logging.info("plan %s: run on %s, its outputs differ from the model's by %.1e at most", name,
                     platform, difference)


def _write_orbax(folder: pathlib.Path, trained: LoadedModel) -> None:
    metadata = trained.metadata()
    metadata |= {key: value for key, value in read_metadata(trained.path).items() if key in metadata}
    weights.save(folder, trained.params, metadata | {'exported': {
        'path': trained.path, 'step': trained.step, 'moving_average': _EMA.value}})
    assert jax.tree.all(jax.tree.map(np.array_equal, open_model(folder).params, trained.params))
    logging.info('the exported weights equal those of the checkpoint')


if __name__ == '__main__':
    cli.run(main, 'CHECKPOINT', 'DIR')
