"""Records the data, teacher, versions and devices of a run in its workdir, and compares them at each start.

config.json stores the record, the class names and the segments of the run (see `positions`).
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
    """The record of one start of a run."""

    train: dict[str, Any]     # description of the training data; see `fingerprint.describe`
    test: dict[str, Any]      # description of the test data
    learned: dict[str, str]   # fingerprints of label maps and teacher, by name
    versions: dict[str, str]
    devices: int              # number of devices that share a batch
    mixes: bool               # True if mixup, cutmix or MixToken is on; their draws depend on the number of devices


def of_run(run: Experiment, teacher: Teacher | None) -> Record:
    """Returns the record of this start of a run."""
    for source in (run.train_source, run.test_source):
        if not hasattr(source, 'fingerprint'):
            logging.info('%s has no fingerprint: changes of its data are detected by the number of examples and the '
                         'class names only', type(source).__name__)
    learned = {}
    if run.targets:
        learned['label maps'] = run.targets.maps.fingerprint
    if teacher:
        learned['weights of the teacher'] = teacher.digest
    return Record(fingerprint.describe(run.train_source), fingerprint.describe(run.test_source), learned,
                  identity.versions(), run.mesh.size, limits.mixes(run.flat_config))


def compare(path: str | os.PathLike, now: Record, *, accept_changes: bool) -> None:
    """Compares a start with the run in the workdir, then records it there. A new run also records its first segment.

    Raises:
      ValueError: the run was trained with other data or another teacher, and `accept_changes` is False.
    """
    saved = workdirs.saved_config(path)
    if (old := saved.get('recorded')) is not None:
        old = Record(**old)
        if changes := _changes(old, now):
            kind = 'other data' if (old.train, old.test) != (now.train, now.test) else 'another teacher or label maps'
            message = f'{kind} ({"; ".join(changes)})'
            if not accept_changes:
                raise ValueError(f'workdir {path} holds a run with {message}: restore its data or teacher, give '
                                 'another --workdir, or --accept_changes to continue with the new data or teacher from '
                                 'the same position in the epoch')
            logging.warning('continuing with %s', message)
        if old.test != now.test:
            logging.warning('the test data changed: evaluations before and after this start, and WORKDIR/best, cannot '
                            'be compared')
        _log_environment_changes(old, now)
    elif workdirs.newest_step(path) is not None:
        logging.info('the workdir has no record of data, teacher and versions; they are recorded now, and compared at '
                     'the next start')
    first = Segment(0, 0, saved['batch_size'], saved['data.repeats'], now.train['examples'])
    workdirs.write_flat(path, {'segments': [first._asdict()]} | saved | {'recorded': now._asdict()})


def record_segment(path: str | os.PathLike, run: Experiment, step: int) -> int:
    """Records a new segment of a run that resumes at a step. Logs a change of its position in epochs.

    Returns:
      The offset of the segment.
    """
    saved = workdirs.saved_config(path)
    recorded = [Segment(**segment) for segment in saved['segments']]
    now = Segment(0, 0, run.config.batch_size, run.config.data.repeats, len(run.train_source))
    segments = positions.extend_segments(recorded, step, now)
    if segments != tuple(recorded):
        workdirs.write_flat(path, saved | {'segments': [segment._asdict() for segment in segments]})
    if segments[-1].step == step and len(segments) > 1:
        logging.warning('%s', positions.describe_change(*segments[-2:], step, run.config.epochs))
    return segments[-1].offset


def warn_of_other_data(saved: dict[str, Any], source: Source) -> None:
    """Logs a warning if a source differs from the data on which a run was evaluated.

    Args:
      saved: flat config of the run.
    """
    if (old := saved.get('recorded')) and (
            differences := fingerprint.differences(old['test'], fingerprint.describe(source))):
        logging.warning('these are not the examples that the run itself was evaluated on: %s', ', '.join(differences))


def _changes(old: Record, now: Record) -> list[str]:
    changes = [f'{split}: {difference}' for split in ('train', 'test')
               for difference in fingerprint.differences(getattr(old, split), getattr(now, split))]
    return changes + [f'{name}: {old.learned.get(name, "none")} then, {now.learned.get(name, "none")} now'
                      for name in sorted(old.learned | now.learned) if old.learned.get(name) != now.learned.get(name)]


def _log_environment_changes(old: Record, now: Record) -> None:
    """Logs changes of versions and devices. They are allowed, but can change the results."""
    changed = [f'{name} {old.versions.get(name)} -> {version}' for name, version in now.versions.items()
               if old.versions.get(name) != version]
    if changed:
        logging.info('software changed since the last start, so results may differ in their bits: %s',
                     ', '.join(changed))
    if now.mixes and old.devices != now.devices:
        logging.warning('%d devices share a batch, %d did at the last start: mixup, cutmix and MixToken are drawn for '
                        'each device, so images are mixed differently from here on', now.devices, old.devices)
