"""The record of a run in its workdir: its data, teacher, versions and devices, and its segments (see `positions`).

It is compared at each start, and stands in config.json beside the class names.
"""

import os
from typing import Any, NamedTuple

from absl import logging

from evit_jax.checkpoints import workdir as workdirs
from evit_jax.data import fingerprint, positions
from evit_jax.data.positions import Segment
from evit_jax.data.sources import Source
from evit_jax.training import identity, limits
from evit_jax.training.distillation import Teacher
from evit_jax.training.experiment import Experiment


class Record(NamedTuple):
    """The record of one start."""

    train: dict[str, Any]     # see `fingerprint.describe`
    test: dict[str, Any]
    learned: dict[str, str]   # fingerprints of label maps and teacher, by name
    versions: dict[str, str]
    devices: int              # that share a batch
    mixes: bool               # the number of devices decides the draws of mixup, cutmix or MixToken


def of_run(run: Experiment, teacher: Teacher | None) -> Record:
    """The record of a start."""
    for source in (run.train_source, run.test_source):
        if not hasattr(source, 'fingerprint'):
            logging.info('%s has no fingerprint: a change of its data is found by the number of examples and the class '
                         'names alone', type(source).__name__)
    learned = {}
    if run.targets:
        learned['label maps'] = run.targets.maps.fingerprint
    if teacher:
        learned['weights of the teacher'] = teacher.digest
    return Record(fingerprint.describe(run.train_source), fingerprint.describe(run.test_source), learned,
                  identity.versions(), run.mesh.size, limits.mixes(run.config))


def compare(path: str | os.PathLike, now: Record, *, accept_changes: bool) -> None:
    """Records data, teacher, versions and devices in the workdir's config; a new run's first segment too.

    Raises:
      ValueError: the run in the workdir has trained on other data, or with another teacher, and that is not accepted.
    """
    saved = workdirs.saved_config(path)
    if (old := saved.get('recorded')) is not None:
        old = Record(**old)
        if changed := _changes(old, now):
            kind = 'other data' if (old.train, old.test) != (now.train, now.test) else 'another teacher or label maps'
            said = f'{kind} ({"; ".join(changed)})'
            if not accept_changes:
                raise ValueError(f'workdir {path} holds a run with {said}: bring back what it began with, give another '
                                 '--workdir, or --accept_changes to go on with what is there now, from the place in '
                                 'the epoch that the run has reached')
            logging.warning('going on with %s', said)
        if old.test != now.test:
            logging.warning('evaluations before and from now on are of other examples: they, and WORKDIR/best, are not '
                            'to be compared')
        _tell_of_surroundings(old, now)
    elif workdirs.newest_step(path) is not None:
        logging.info('this run began before data, teacher and versions were recorded: they are recorded now, and '
                     'compared from the next start on')
    begun = Segment(0, 0, saved['batch_size'], saved['data.repeats'], now.train['examples'])
    workdirs.write_flat(path, {'segments': [begun._asdict()]} | saved | {'recorded': now._asdict()})


def go_on(path: str | os.PathLike, run: Experiment, step: int) -> int:
    """Records the segment of a run that goes on at a step, and logs a change of its position in epochs.

    Returns:
      The segment's offset.
    """
    saved = workdirs.saved_config(path)
    known = [Segment(**segment) for segment in saved['segments']]
    now = Segment(0, 0, run.config.batch_size, run.config.data.repeats, len(run.train_source))
    segments = positions.extend_segments(known, step, now)
    if segments != tuple(known):
        workdirs.write_flat(path, saved | {'segments': [segment._asdict() for segment in segments]})
    if segments[-1].step == step and len(segments) > 1:
        logging.warning('%s', positions.describe_change(*segments[-2:], step, run.config.epochs))
    return segments[-1].offset


def tell_of_other_data(saved: dict[str, Any], source: Source) -> None:
    """Logs a line where a run, with this saved config, was evaluated on other examples than those of the source."""
    if (old := saved.get('recorded')) and (said := fingerprint.differences(old['test'], fingerprint.describe(source))):
        logging.warning('these are not the examples that the run itself was evaluated on: %s', ', '.join(said))


def _changes(old: Record, now: Record) -> list[str]:
    said = [f'{split}: {difference}' for split in ('train', 'test')
            for difference in fingerprint.differences(getattr(old, split), getattr(now, split))]
    return said + [f'{name}: {old.learned.get(name, "none")} then, {now.learned.get(name, "none")} now'
                   for name in sorted(old.learned | now.learned) if old.learned.get(name) != now.learned.get(name)]


def _tell_of_surroundings(old: Record, now: Record) -> None:
    """Logs changes that are allowed and that change the numbers."""
    changed = [f'{name} {old.versions.get(name)} -> {version}' for name, version in now.versions.items()
               if old.versions.get(name) != version]
    if changed:
        logging.info('other software than at the last start, so the bits may differ: %s', ', '.join(changed))
    if now.mixes and old.devices != now.devices:
        logging.warning('%d devices share a batch, %d did at the last start: images are mixed with other partners and '
                        'shares, as these are drawn for each device', now.devices, old.devices)
