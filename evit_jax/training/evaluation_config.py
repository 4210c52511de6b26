"""Computes the config values of an evaluation from the run in the workdir, a config file and the command line."""

from collections.abc import Collection, Mapping
from typing import Any

from absl import logging

from evit_jax import models
from evit_jax.checkpoints import open_defaults

# Model keys that do not affect the parameters.
_PLAN_KEYS = ('model.image_size', 'model.image_width', 'model.reduce_at', 'model.fuse', 'model.dtype',
              'model.drop_path', 'model.gather_impl', 'model.freeze')
# Keys that affect the result of an evaluation, besides model and preprocessing keys.
_RESULT_KEYS = ('reducer.name', 'reducer.r', 'reducer.decreasing', 'keep.rate', 'keep.rates', 'keep.tokens',
                'keep.drop', 'keep.macs', 'data.source', 'data.name', 'data.path', 'data.test_split', *_PLAN_KEYS[:5])
# Keys that set the number of tokens, and the value that disables each key. A key overrides all keys after it.
_TOKEN_KEYS = {'keep.macs': 0.0, 'reducer.r': 0, 'keep.tokens': [], 'keep.rates': [], 'keep.rate': None}
# Values that disable training-only features: label maps, teacher and initial weights may be missing in an evaluation.
_WITHOUT_TRAINING = {
    'init_from': '', 'model.freeze': '', 'distill.kind': 'none', 'teacher.path': '', 'data.token_labels': '',
    'mixing.erase': 0.0, 'mixing.mixup': 0.0, 'mixing.cutmix': 0.0, 'optimizer.backbone_scale': 1.0,
    'optimizer.backbone_from_epoch': 0.0, 'profile_steps': '', 'checkpoint.best': ''}


def merge(given: Mapping[str, Any], saved: Mapping[str, Any], workdir: str, *,
          explicit: Collection[str] | None = None, from_file: bool = True) -> dict[str, Any]:
    """Returns the values that an evaluation of a run replaces in its config, by dotted key.

    Model, preprocessing and image size are taken from the run, unless a key is given explicitly. If a key affects the
    result and differs from the run, both values are logged.

    Args:
      given: flat config of a file or flat base config, with the explicit keys already set.
      saved: flat config of the run; see `workdir.trained_config`.
      workdir: path of the run, for error messages.
      explicit: keys given on the command line. None: the image size and the model keys count as explicit; the model
        keys must equal those of the run.
      from_file: True: take the other keys from `given`; False: take them from the run.

    Raises:
      ValueError: the models differ, no key names the data, or an explicit key would have no effect.
    """
    run = {key: value for key, value in saved.items()
           if key in given and value is not None and (value or key not in open_defaults.NORMALISATION_KEYS)}
    names = {key.partition('[')[0] for key in explicit or ()}
    explicit_keys = {key for key in given if any(f'{key}.'.startswith(f'{name}.') for name in names)}
    model = {key for key in given if key.startswith('model.') and key not in _PLAN_KEYS}
    for key in model - run.keys():
        run[key] = type(given[key])()  # 0, '' and False stand for the value of the named model
    explicit_keys -= {key for key in model | {*open_defaults.NORMALISATION_KEYS} if _is_open(given[key])}
    _check_model(given, run, model if explicit is None else model & explicit_keys, workdir)
    if not from_file and 'data.source' not in run.keys() | explicit_keys:
        raise ValueError(f'{workdir} holds weights alone, and nothing names the images to evaluate on: give '
                         '--config.data.source=folder --config.data.path=DIR, or --config FILE')
    kept = {*open_defaults.PREPROCESSING_KEYS, *model, *(() if explicit is None else _PLAN_KEYS[:2])}
    values = {key: run[key] for key in run.keys() - explicit_keys if not from_file or key in kept}
    if 'model.image_size' in explicit_keys:  # alone, it is the side of a square
        values.pop('model.image_width', None)
    if given['model.dtype'] == 'auto' and 'model.dtype' in run.keys() - explicit_keys:
        values['model.dtype'] = run['model.dtype']
    if explicit_keys & _TOKEN_KEYS.keys():
        values |= {key: off for key, off in {**_TOKEN_KEYS, 'keep.drop': []}.items()
                   if key not in explicit_keys and off is not None}
    used = {**given, **values}
    _check_token_keys(used, names)
    _log_differences(given, used, run, explicit_keys, workdir, from_file)
    values |= _WITHOUT_TRAINING
    return values | open_defaults.resolve({**given, **values})


def batch_size_for(images: int, devices: int, batch_size: int) -> int:
    """Returns the batch size reduced to the number of images, because padding costs time."""
    return min(-(-images // devices) * devices, batch_size)


def _check_model(given, run, keys, workdir):
    """Raises a ValueError if one of the keys differs between two flat configs."""
    given, run = models.resolve(given), models.resolve(run)
    if given['model.name'] != run['model.name']:
        keys = keys & {'model.name'}  # the other keys differ because the models differ
    differ = [key for key in sorted(keys) if given[key] != run[key] and not _is_open(given[key])]
    if differ:
        message = ', '.join(f'{key} {run[key]} there, {given[key]} here' for key in differ)
        raise ValueError(f'workdir {workdir} holds another model ({message}): use the config that it was trained with')


def _check_token_keys(used, names):
    """Raises a ValueError if an explicit key for the number of tokens would have no effect."""
    explicit = [key for key in _TOKEN_KEYS if key in names and used[key]]
    if len(explicit) > 1:
        raise ValueError(f'give only one of {" and ".join(f"--config.{key}" for key in explicit)}')
    if 'keep.rate' in explicit and used['keep.rate'] != 1 and not used['model.reduce_at']:
        raise ValueError(f'config.keep.rate={used["keep.rate"]} drops nothing, as model.reduce_at names no block: give '
                         '--config.model.reduce_at, too')


def _is_open(value):
    """Returns True if the value is open: the model or the data determines it."""
    return value in (0, '', 'auto', []) and value is not False


def _log_differences(given, used, run, explicit_keys, workdir, from_file):
    """Logs the used values that differ from the run, and the values of the config file that are not used."""
    deciding = {*_RESULT_KEYS, *open_defaults.PREPROCESSING_KEYS} & run.keys()
    differ = [key for key in sorted(deciding) if used[key] != run[key]]
    for key in (key for key in differ if key in explicit_keys):
        level = logging.WARNING if key in open_defaults.PREPROCESSING_KEYS else logging.INFO
        logging.log(level, 'config.%s=%s as set explicitly; the run in %s has %s', key, used[key], workdir, run[key])
    lines = [f'{key} {used[key]} (the run has {run[key]})' for key in differ if key not in explicit_keys]
    if from_file:
        lines += [f'{key} {used[key]} as in the run (the config has {given[key]})'
                  for key in sorted(run.keys() - explicit_keys) if given[key] != used[key] == run[key]
                  and not (_is_open(given[key]) and key != 'data.eval_crop')]
    if lines:
        logging.info('the config differs from that of the run in %s: %s', workdir, ', '.join(lines))
