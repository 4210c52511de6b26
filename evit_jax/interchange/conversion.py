"""From a file of another program to a folder that a run can start from, and back; says in the log what it finds."""

import contextlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import logging

from evit_jax.checkpoints import weights, workdir
from evit_jax.checkpoints.manager import read_newest
from evit_jax.interchange import detect, files, folders, interpretation, layouts, run_metadata, safetensors_file, vit
from evit_jax.models import config_from_flat
from evit_jax.reduction.reducer import modules_of
from evit_jax.reduction.registry import get_reducer
from evit_jax.runtime import storage


def from_file(src: str | os.PathLike, dst: str | os.PathLike, *, ema: bool = False, key: str = '',
              image_size: int | None = None, class_names: str | os.PathLike | None = None,
              allow_missing: Sequence[str] = (), allow_extra: Sequence[str] = (), **values: Any) -> None:
    """Writes the weights in a file as the workdir of a run that is known by its weights alone.

    Args:
      src: a file, or a folder of Hugging Face.
      dst: a folder, which is made.
      ema: take the moving average.
      key: the dict in the file, or the prefix of names, that holds the weights, as `wrapped.take` has it.
      image_size: the position embeddings are resized for it.
      class_names: file of them, one in a line.
      allow_missing, allow_extra: patterns of timm's keys, as in `vit.from_torch`.
      values: by the names in `facts.KEYS`; they win over those of the file. None and () are ignored.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: `dst` is there already, or the file is refused, or does not fit; says why.
    """
    _check_places(src, dst)
    path = pathlib.Path(src).expanduser()
    path = folders.weights_in(path) if path.is_dir() else path
    if os.fspath(dst).endswith(('.safetensors', '.pth', '.pt')):
        raise ValueError(f'{dst} is the name of a file, and {src} is to become a run: give a folder that is to be made')
    beside = folders.configs_beside(path)
    flags = {fact: value for fact, value in values.items() if value not in (None, ())}
    with files.opened(path) as (tree, metadata):
        given = interpretation.Given(path, tree, metadata, beside)
        config, names = run_metadata.from_metadata(metadata)
        names = _class_names(names or folders.class_names(given.config), class_names)
        try:
            found = layouts.find(tree, ema=ema, key=key)
            name, model_config = detect.detect(found.arrays, classes=len(names) or 1000)
            model_config, preprocessing, found = interpretation.interpreted(name, model_config, found, given, flags)
            modules = vit.learned_modules(found.arrays)
            _log_model(path, name, model_config, modules, found)
            if len(names) not in (0, model_config.classes):
                raise ValueError(f'there are {len(names)} names for {model_config.classes} classes: give --class_names')
            params = vit.from_torch(found.arrays, model_config, allow_missing=allow_missing, allow_extra=allow_extra)
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from error
    weights.check_finite(vit.to_torch(params, model_config, modules), path)
    params, model_config = _resized(params, model_config, image_size)
    asked = {'reducer.name': modules.reducer.name} if modules.count else {}
    config = asked | config | run_metadata.settings_of(found.settings) | preprocessing
    assumed, keys = run_metadata.assumed(name, model_config), run_metadata.model_keys(name, model_config)
    _save(dst, params, config, assumed, keys, names)


def _log_model(path, name, config, modules, found):
    learned = f', {modules.count} learned modules of {modules.reducer}' if modules.count else ''
    logging.info('%s: %s, images of %d, %d classes%s%s; names of %s; values %s', path, name, config.image_size,
                 config.classes, ', distilled' * config.distilled, learned, found.layout, _types(found.arrays))
    if config.one_head:
        logging.warning("its distillation token has no head: the class token's decides alone, as in Hugging Face's "
                        'DeiTForImageClassification')


def _save(dst, params, config, usual, model, names):
    """Writes the folder; the log lists the config keys that are as usual."""
    if unsaid := usual.keys() - config.keys():
        logging.info('nothing says otherwise, so that it is as usual: %s',
                     ', '.join(f'{key} {usual[key]}' for key in sorted(unsaid)))
    model = {f'model.{key}': value for key, value in model.items()}
    told = {'config': _nested(usual | config | model)} | ({'class_names': names} if names else {})
    with _made(dst):
        weights.save(dst, params, told)
    logging.info('%s is written: start from it with --config.init_from=%s', dst, dst)


def to_file(src: str | os.PathLike, dst: str | os.PathLike, *, ema: bool = False,
            image_size: int | None = None) -> None:
    """Writes the newest weights of a run as a safetensors file in the layout of timm, or of LV-ViT's authors.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: `dst` is there already, or there is no run, or no average; says which.
    """
    _check_places(src, dst)
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
    params = weights.fitted(params, vit.template(model_config, modules), src)
    params, model_config = _resized(params, model_config, image_size)
    arrays = vit.to_torch(params, model_config, modules)
    weights.check_finite(arrays, src)
    safetensors_file.write(dst, arrays, run_metadata.to_metadata(name, model_config, config))
    logging.info('%s of step %d written to %s', 'moving average' if ema else 'weights', told['next_step'], dst)
    if call := '' if modules.count else run_metadata.timm_call(name, model_config, dst):
        logging.info('in timm: %s', call)
    else:
        logging.warning('timm has no model like %s: the file can be converted back, and no more', name)


def _check_places(src, dst):
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
    return vit.resized(params, config, size)


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
