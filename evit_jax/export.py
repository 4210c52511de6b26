"""Packs a trained model to be served: python -m evit_jax.export runs/digits served/digits --rates=0.5,0.7,1.0

CHECKPOINT is the folder of a run, its `best`, or one of weights alone. DIR is made, and appears when it is complete: a
program of StableHLO for each plan, which runs on CPUs, GPUs and TPUs with any batch size, weights that all of them
share, a manifest with sizes, class names and checksums, and a loader that needs jax and Pillow, and not this package;
its README says the rest. What was written is run before the program ends, and its probabilities compared with the
model's. A program that is killed leaves DIR.unfinished-..., which may be deleted.

With --format=orbax DIR becomes a checkpoint of the weights alone, without the optimizer's state, with the config, for
Orbax and for all that reads a run here: predict, evaluate, --config.init_from.
"""

import contextlib
import errno
import pathlib
import shutil
import uuid
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags, logging

from evit_jax import cli
from evit_jax.checkpoints import weights
from evit_jax.checkpoints.loaded import LoadedModel, load_model
from evit_jax.checkpoints.manager import read_metadata
from evit_jax.data.names import in_one_line
from evit_jax.reduction.plan import TokenPlan
from evit_jax.reduction.plan_file import read_plan_file
from evit_jax.reduction.registry import list_reducers
from evit_jax.runtime import backend, storage
from evit_jax.serving import artifact

_RATES = flags.DEFINE_list('rates', [], 'A plan for each: the share of the tokens that every reduction keeps.')
_TOKENS = flags.DEFINE_multi_string('tokens', [], 'A plan of the tokens that each reduction keeps, as 137,96,67; may '
                                    'be given again. Without --rates, --tokens, --r and --plan there is one plan, '
                                    'that of training. It is the default where it is among them, else the first is.')
_R = flags.DEFINE_list('r', [], 'A plan for each: the tokens that every block merges, of a reducer that merges.')
_PLANS = flags.DEFINE_multi_string('plan', [], 'A plan of the planner (python -m evit_jax.plan), by its file, which '
                                   'also names it; may be given again.')
_REDUCER = flags.DEFINE_string('reducer', None, 'Method that reduces the tokens; as trained if not given. '
                               f'{", ".join(list_reducers())}.')
_PLATFORMS = flags.DEFINE_list('platforms', ['cpu', 'cuda', 'tpu'],
                               f'Where the programs are to run: {", ".join(artifact.PLATFORMS)}.')
_KEPT = flags.DEFINE_bool('kept', False, 'The programs also return the patches that each reduction keeps.')
_DTYPE = flags.DEFINE_enum('dtype', None, list(artifact.TOLERANCE), 'Of the computation; as trained if not given.')
_EMA = flags.DEFINE_bool('ema', False, 'The moving average of the weights.')
_FORMAT = flags.DEFINE_enum('format', 'stablehlo', ['stablehlo', 'orbax'], 'What DIR is to hold.')
_OF_PROGRAMS = _RATES, _TOKENS, _R, _PLANS, _REDUCER, _PLATFORMS, _KEPT, _DTYPE


def main(checkpoint: str, dst: str) -> None:
    """Writes DIR, whole or not at all."""
    backend.start()
    if storage.is_remote(dst):
        raise ValueError(f'{dst} is no folder of this machine: export to one, then copy it')
    folder = pathlib.Path(dst).expanduser().absolute()
    if folder.is_symlink() or folder.exists():
        raise ValueError(f'{dst} is there already, and is left as it is: give another DIR')
    wanted, platforms = _wanted_plans(), _platforms()
    if _FORMAT.value == 'orbax' and (given := [flag.name for flag in _OF_PROGRAMS if flag.present]):
        raise ValueError(f'--{given[0]} is for programs, and a checkpoint holds none: leave it out')
    trained = load_model(checkpoint, ema=_EMA.value).with_reducer(_REDUCER.value)
    logging.info('%s, step %d of %s', trained.name, trained.step, checkpoint)
    if _FORMAT.value == 'orbax':
        with _appearing(folder, trained) as unfinished:
            _write_orbax(unfinished, trained)
    else:
        trained = trained._replace(dtype=_DTYPE.value or trained.dtype)
        plans = {name: trained.plan(**how) for name, how in wanted.items()}
        default = artifact.default_plan(trained, plans)
        if plans[default] != artifact.plan_of_training(trained):
            logging.warning('the plan of training is not among those requested: %s is the default', default)
        with _appearing(folder, trained) as unfinished:
            artifact.write(unfinished, trained, plans, platforms=platforms, kept=_KEPT.value, ema=_EMA.value)
            _check(unfinished, trained, plans, platforms)
    logging.info('%s is written', dst)


def _wanted_plans() -> dict[str, dict]:
    """By name, what `LoadedModel.plan` is to be asked for."""
    counts = [cli.numbers('tokens', text.split(','), int) for text in _TOKENS.value]
    asked = [(str(rate), '--rates', {'rate': rate}) for rate in cli.numbers('rates', _RATES.value, float)]
    asked += [('-'.join(map(str, tokens)), '--tokens', {'tokens': tokens}) for tokens in counts]
    asked += [(f'r{r}', '--r', {'r': r}) for r in cli.numbers('r', _R.value, int)]
    asked += [(in_one_line(pathlib.Path(file).stem), f'--plan={in_one_line(file)}', {'planned': read_plan_file(file)})
              for file in _PLANS.value]
    origins = {}
    for name, origin, _ in asked:
        if origins.setdefault(name, origin) != origin:
            raise ValueError(f'{origins[name]} and {origin} are two plans of one name, {name}: rename a file')
    names = [name for name, *_ in asked]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f'the plan {twice[0]} is asked for twice: give each once')
    return {name: how for name, _, how in asked} or {'trained': {}}


def _platforms() -> tuple[str, ...]:
    known = artifact.PLATFORMS
    if wrong := [name for name in _PLATFORMS.value if name not in known]:
        raise ValueError(f'--platforms: {wrong[0]!r} is unknown, there are {", ".join(known)}')
    if not _PLATFORMS.value:
        raise ValueError(f'--platforms is empty: give some of {", ".join(known)}')
    return tuple(dict.fromkeys(_PLATFORMS.value))


def _check(folder: pathlib.Path, trained: LoadedModel, plans: dict[str, TokenPlan], platforms: tuple[str, ...]) -> None:
    here = jax.export.default_export_platform()
    if here not in platforms:
        logging.warning('not run: the programs are for %s, and this machine computes on %s', ', '.join(platforms), here)
        return
    for name, difference in artifact.check(folder, trained, plans):
        logging.info("plan %s: run on %s, its probabilities differ from the model's by %.1e at most", name, here,
                     difference)


def _write_orbax(folder: pathlib.Path, trained: LoadedModel) -> None:
    metadata = read_metadata(trained.path)
    told = {key: metadata[key] for key in ('config', 'class_names') if key in metadata}
    weights.save(folder, trained.params, told | {'exported': {
        'path': trained.path, 'step': trained.step, 'moving_average': _EMA.value}})
    assert jax.tree.all(jax.tree.map(np.array_equal, load_model(folder).params, trained.params))
    logging.info('read again, the weights are the same')


@contextlib.contextmanager
def _appearing(folder: pathlib.Path, trained: LoadedModel) -> Iterator[pathlib.Path]:
    """A folder beside the one wanted, which takes its place at the end of the body; nothing stays of a failure."""
    unfinished = folder.with_name(f'{folder.name}.unfinished-{uuid.uuid4().hex[:8]}')
    try:
        unfinished.mkdir(parents=True)
        needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(trained.params)), shutil.disk_usage(unfinished).free
        if free < needed:
            raise OSError(errno.ENOSPC, f'{free / 1e6:.1f} MB free, {needed / 1e6:.1f} MB of weights')
        yield unfinished
        unfinished.rename(folder)
    except OSError as error:
        raise ValueError(f'{folder} cannot be written ({error.strerror or error}): make room there, or give another '
                         'DIR') from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


if __name__ == '__main__':
    cli.run(main, 'CHECKPOINT', 'DIR')
