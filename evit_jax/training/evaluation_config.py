"""The config of an evaluation: of the run in the workdir, of a config file, and of flags on the command line."""

from collections.abc import Collection, Mapping
from typing import Any

from absl import logging

from evit_jax import models
from evit_jax.checkpoints import open_defaults
from evit_jax.checkpoints import workdir as workdirs

# Keys of the model that its weights do not depend on.
_OF_PLAN = ('model.image_size', 'model.reduce_at', 'model.fuse', 'model.dtype', 'model.drop_path', 'model.gather_impl')
# Keys that decide the result of an evaluation, beside those of the model and of the preprocessing.
_OF_RESULT = ('reducer.name', 'reducer.r', 'reducer.decreasing', 'keep.rate', 'keep.rates', 'keep.tokens', 'keep.macs',
              'data.source', 'data.name', 'data.path', 'data.test_split', *_OF_PLAN[:4])
# Each of these is ignored where one before it is set.
_TOKENS = {'keep.macs': 0.0, 'reducer.r': 0, 'keep.tokens': [], 'keep.rates': [], 'keep.rate': None}
# What only training needs: its data, teacher and initial weights need not be there, nor go with this model.
_WITHOUT_TRAINING = {
    'init_from': '', 'distill.kind': 'none', 'teacher.path': '', 'data.token_labels': '', 'mixing.erase': 0.0,
    'mixing.mixup': 0.0, 'mixing.cutmix': 0.0, 'optimizer.backbone_scale': 1.0, 'optimizer.backbone_from_epoch': 0.0,
    'profile_steps': '', 'checkpoint.best': ''}


def merge(config: Any, saved: Mapping[str, Any], workdir: str, *, explicit: Collection[str] | None = None,
          from_file: bool = True) -> Any:
    """The config to evaluate a run with. Model, preprocessing and image size are the run's; an explicit key wins.

    Every key that decides the result and differs from the run's is logged with both values.

    Args:
      config: a file's config, or the base config without a file; explicit keys are set in it.
      saved: flat config of the run, see `workdir.trained_config`.
      workdir: for messages.
      explicit: keys set on the command line; None: those of the model, which then are compared with the run's, and the
        image size.
      from_file: the other keys are those of `config`; else they are those of the run, too.

    Raises:
      ValueError: another model, nothing names the data, or explicit keys that change nothing.
    """
    here = workdirs.flat(config.to_dict())
    run = {key: value for key, value in saved.items()
           if key in here and value is not None and (value or key not in open_defaults.NORMALISATION_KEYS)}
    named = {key.partition('[')[0] for key in explicit or ()}
    chosen = {key for key in here if any(f'{key}.'.startswith(f'{name}.') for name in named)}
    model = {key for key in here if key.startswith('model.') and key not in _OF_PLAN}
    for key in model - run.keys():
        run[key] = type(here[key])()  # runs that began before there was such a key
    chosen -= {key for key in model | {*open_defaults.NORMALISATION_KEYS} if _is_open(here[key])}
    _check_model(here, run, model if explicit is None else model & chosen, workdir)
    if not from_file and 'data.source' not in run.keys() | chosen:
        raise ValueError(f'{workdir} holds weights alone, and nothing names the images to evaluate on: give '
                         '--config.data.source=folder --config.data.path=DIR, or --config FILE')
    kept = (*open_defaults.PREPROCESSING_KEYS, *['model.image_size'] * (explicit is not None))
    values = {key: run[key] for key in run.keys() - chosen if not from_file or key in {*kept, *model}}
    if here['model.dtype'] == 'auto' and 'model.dtype' in run.keys() - chosen:
        values['model.dtype'] = run['model.dtype']
    if chosen & _TOKENS.keys():
        values |= {key: empty for key, empty in _TOKENS.items() if key not in chosen and empty is not None}
    _check_tokens(here | values, named)
    _log_differences(here, here | values, run, chosen, workdir, from_file)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value
                                           for key, value in (values | _WITHOUT_TRAINING).items()})
    return open_defaults.resolve(config)


def with_batch_for(config: Any, images: int, devices: int) -> Any:
    """The config with a smaller batch where it is larger than the data: its padding would be computed, too."""
    needed = -(-images // devices) * devices
    if needed >= config.batch_size:
        return config
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.batch_size = needed
    return config


def _check_model(here, run, keys, workdir):
    here, run = models.resolve(here), models.resolve(run)
    if here['model.name'] != run['model.name']:
        keys = keys & {'model.name'}  # the other keys of another model differ as well
    differ = [key for key in sorted(keys) if here[key] != run[key] and not _is_open(here[key])]
    if differ:
        message = ', '.join(f'{key} {run[key]} there, {here[key]} here' for key in differ)
        raise ValueError(f'workdir {workdir} holds another model ({message}): use the config that it was trained with')


def _check_tokens(used, named):
    """Raises a ValueError where a keep rate, or the like, that is set explicitly would change nothing."""
    asked = [key for key in _TOKENS if key in named and used[key]]
    if len(asked) > 1:
        raise ValueError(f'give only one of {" and ".join(f"--config.{key}" for key in asked)}')
    if 'keep.rate' in asked and used['keep.rate'] != 1 and not used['model.reduce_at']:
        raise ValueError(f'config.keep.rate={used["keep.rate"]} drops nothing, as model.reduce_at names no block: give '
                         '--config.model.reduce_at, too')


def _is_open(value):
    """True where a config leaves a value to the model or the data."""
    return value in (0, '', 'auto', []) and value is not False


def _log_differences(here, used, run, chosen, workdir, from_file):
    """Logs the keys that decide the result and are not those of the run, and those of a file that are not used."""
    deciding = {*_OF_RESULT, *open_defaults.PREPROCESSING_KEYS} & run.keys()
    differ = [key for key in sorted(deciding) if used[key] != run[key]]
    for key in (key for key in differ if key in chosen):
        level = logging.WARNING if key in open_defaults.PREPROCESSING_KEYS else logging.INFO
        logging.log(level, 'config.%s=%s as set explicitly; the run in %s has %s', key, used[key], workdir, run[key])
    lines = [f'{key} {used[key]} (the run has {run[key]})' for key in differ if key not in chosen]
    if from_file:
        lines += [f'{key} {used[key]} as in the run (the config has {here[key]})' for key in sorted(run.keys() - chosen)
                  if here[key] != used[key] == run[key] and not (_is_open(here[key]) and key != 'data.eval_crop')]
    if lines:
        logging.info('the config differs from that of the run in %s: %s', workdir, ', '.join(lines))
