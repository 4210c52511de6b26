"""From a file of another program to a folder that a run can start from, and back; says in the log what it finds."""

import contextlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import logging

from evit_jax.checkpoints import weights, workdir
from evit_jax.checkpoints.manager import read_newest
from evit_jax.interchange import (
    detect,
    files,
    folders,
    interpretation,
    layouts,
    run_metadata,
    safetensors_file,
    torch_weights,
)
from evit_jax.models import Params, config_from_flat
from evit_jax.models.config import ViTConfig
from evit_jax.reduction.reducer import modules_of
from evit_jax.reduction.registry import get_reducer
from evit_jax.runtime import storage


class PretrainedModel(NamedTuple):
    """A model read from the file of another program."""

    name: str                 # of the model, as in `models.CONFIGS`
    config: ViTConfig
    params: Params            # numpy arrays, float32
    metadata: dict[str, Any]  # 'config': nested dict of config keys; 'class_names': list, absent if unknown


def read_pretrained(path: str | os.PathLike, *, ema: bool = False, key: str = '', image_size: int | None = None,
                    class_names: str | os.PathLike | None = None, allow_missing: Sequence[str] = (),
                    allow_extra: Sequence[str] = (), **hyperparameters: Any) -> PretrainedModel:
    """Reads a model from a PyTorch or safetensors file, or from a Hugging Face or timm folder; writes nothing.

    Args:
      path: a file (.pth, .pt, .bin, .safetensors), an index of shards, or a folder that holds one of them.
      ema: read the moving average of the weights.
      key: path of nested dicts, or a prefix of array names, that holds the weights; see `wrapped.take`.
      image_size: resize the position embeddings for images of this size.
      class_names: path of a text file with one class name a line.
      allow_missing, allow_extra: patterns of timm's array names; see `torch_weights.from_torch`.
      **hyperparameters: values by the names in `facts.KEYS`; they override the file. None and () are ignored.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is refused, or does not hold a supported model.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f'{path} is not there: give a file of weights (.pth, .pt, .safetensors), or a workdir')
    path = folders.weights_in(path) if path.is_dir() else path
    given_values = {name: value for name, value in hyperparameters.items() if value not in (None, ())}
    with files.opened(path) as (tree, metadata):
        given = interpretation.Given(path, tree, metadata, folders.configs_beside(path))
        settings, names = run_metadata.from_metadata(metadata)
        names = _class_names(names or folders.class_names(given.config), class_names)
        try:
            found = layouts.find(tree, ema=ema, key=key)
            name, config = detect.detect(found.arrays, classes=len(names) or 1000)
            config, preprocessing, found = interpretation.interpreted(name, config, found, given, given_values)
            modules = torch_weights.learned_modules(found.arrays)
            _log_model(path, name, config, modules, found)
            if len(names) not in (0, config.classes):
                raise ValueError(f'there are {len(names)} names for {config.classes} classes: give --class_names')
            params = torch_weights.from_torch(found.arrays, config, allow_missing=allow_missing,
                                              allow_extra=allow_extra)
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from error
    weights.check_finite(torch_weights.to_torch(params, config, modules), path)
    params, config = _resized(params, config, image_size)
    reducer = {'reducer.name': modules.reducer.name} if modules.count else {}
    settings = reducer | settings | run_metadata.settings_of(found.settings) | preprocessing
    return PretrainedModel(name, config, params, _metadata(name, config, settings, names))


def _metadata(name, config, settings, class_names):
    """The metadata of a checkpoint; the log lists the config keys that have default values."""
    defaults = run_metadata.assumed(name, config)
    if assumed := defaults.keys() - settings.keys():
        logging.info('default values, as nothing gives others: %s',
                     ', '.join(f'{key} {defaults[key]}' for key in sorted(assumed)))
    model = {f'model.{key}': value for key, value in run_metadata.model_keys(name, config).items()}
    return {'config': _nested(defaults | settings | model)} | ({'class_names': class_names} if class_names else {})


def to_workdir(src: str | os.PathLike, dst: str | os.PathLike, **options: Any) -> None:
    """Writes the model in a file of another program as a workdir that `--config.init_from` accepts.

    Args:
      src: as in `read_pretrained`.
      dst: folder to create.
      **options: the keyword arguments of `read_pretrained`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: `dst` exists, or the file is refused.
    """
    _check_paths(src, dst)
    if os.fspath(dst).endswith(('.safetensors', '.pth', '.pt')):
        raise ValueError(f'{dst} is the name of a file, and {src} is to become a run: give a folder that is to be made')
    model = read_pretrained(src, **options)
    with _made(dst):
        weights.save(dst, model.params, model.metadata)
    logging.info('%s is written: start from it with --config.init_from=%s', dst, dst)


def _log_model(path, name, config, modules, found):
    learned = f', {modules.count} learned modules of {modules.reducer}' if modules.count else ''
    logging.info('%s: %s, images of %d, %d classes%s%s; names of %s; values %s', path, name, config.image_size,
                 config.classes, ', distilled' * config.distilled, learned, found.layout, _types(found.arrays))
    if config.one_head:
        logging.warning("its distillation token has no head: the class token's decides alone, as in Hugging Face's "
                        'DeiTForImageClassification')


def to_safetensors(src: str | os.PathLike, dst: str | os.PathLike, *, ema: bool = False,
            image_size: int | None = None) -> None:
    """Writes the newest weights of a run as a safetensors file in the layout of timm, or of LV-ViT's authors.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: `dst` is there already, or there is no run, or no average; says which.
    """
    _check_paths(src, dst)
    if storage.is_remote(dst) or not os.fspath(dst).endswith('.safetensors'):
        raise ValueError(f'{src} is a folder: if it is a run, give DST the name of a file of this machine that ends in '
                         '.safetensors; if not, give the file of weights in it')
    config = workdir.saved_config(src)
    if config is None:
        raise ValueError(f'{src} is not the workdir of a run: it holds no {workdir.CONFIG_FILE}')
    name = config['model.name']
    model_config = config_from_flat(config)
    params, told = read_newest(src, 'ema' if ema else 'params')
    if not params:
        raise ValueError(f'the run in {src} kept no moving average: leave out --ema')
    modules = modules_of(get_reducer(config.get('reducer.name', 'evit')), params)
    params = weights.fitted(params, torch_weights.template(model_config, modules), src)
    params, model_config = _resized(params, model_config, image_size)
    arrays = torch_weights.to_torch(params, model_config, modules)
    weights.check_finite(arrays, src)
    safetensors_file.write(dst, arrays, run_metadata.to_metadata(name, model_config, config))
    logging.info('%s of step %d written to %s', 'moving average' if ema else 'weights', told['next_step'], dst)
    if call := '' if modules.count else run_metadata.timm_call(name, model_config, dst):
        logging.info('in timm: %s', call)
    else:
        logging.warning('timm has no model like %s: the file can be converted back, and no more', name)


def _check_paths(src, dst):
    if not storage.as_path(src).exists():
        raise FileNotFoundError(f'{src} is not there: give a file of weights (.pth, .pt, .safetensors), or a workdir')
    if storage.as_path(dst).exists():
        raise ValueError(f'{dst} is there already, and is left as it is: give another DST')


def _types(arrays):
    kinds = sorted({value.dtype.name for value in arrays.values() if value.shape} - {'float32'})  # a counter has none
    return f'{" and ".join(kinds)} become float32' if kinds else 'float32'


def _class_names(held, path):
    """The names in a file of --class_names, else those that came with the weights."""
    if not path:
        return held
    try:
        lines = pathlib.Path(path).read_text(encoding='utf-8-sig').rstrip('\n').split('\n')
    except UnicodeDecodeError as error:
        raise ValueError(f'--class_names={path} is not in UTF-8 ({error}): save it as UTF-8') from error
    names = [line.strip() for line in lines]
    if not all(names):
        raise ValueError(f'--class_names={path} has {"an empty line" if any(names) else "no lines"}: give one name a '
                         'line')
    if held and held != names:
        logging.warning('--class_names=%s names other classes than come with the weights (%s ... there): the flag wins',
                        path, held[0])
    return names


def _resized(params, config, size):
    if size is None or size == config.image_size:
        return params, config
    logging.info('position embeddings resized from images of %d to %d', config.image_size, size)
    return torch_weights.resized(params, config, size)


def _nested(flat):
    out = {}
    for key, value in flat.items():
        part, _, rest = key.partition('.')
        out.setdefault(part, {})[rest] = value
    return out


@contextlib.contextmanager
def _made(dst):
    """A new folder, removed again if the body fails: what is left of it would be in the way of the next try."""
    folder = storage.as_path(dst)
    folder.mkdir(parents=True)
    try:
        yield
    except BaseException:
        folder.rmtree(missing_ok=True)
        raise
