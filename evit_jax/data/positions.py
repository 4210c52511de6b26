"""Tracks the position of a run in its data. It is counted in samples, so a resumed run may change its batch size.

A run is a sequence of segments. Batch size and epoch length are constant within a segment. A run that resumes with
another batch size, other repeats or another number of examples starts a new segment at the same position in the same
epoch. The step numbers continue. A run without such changes has one segment; its step s begins at sample
s * batch_size.
"""

from collections.abc import Sequence
from typing import NamedTuple

from evit_jax.data import order


class Segment(NamedTuple):
    """Steps with the same batch size and epoch length."""

    step: int             # first step
    samples: int          # number of samples before the first step, as if all epochs had this segment's length
    batch_size: int
    repeats: int
    examples: int | None  # None: an older version did not record it

    @property
    def epoch_samples(self) -> int:
        return order.epoch_samples(self.examples, self.repeats)

    @property
    def offset(self) -> int:
        """Difference between the first sample of step s and s * batch_size."""
        return self.samples - self.step * self.batch_size

    def epoch(self, step: int) -> float:
        """Returns the number of epochs completed before a step."""
        return (step * self.batch_size + self.offset) / self.epoch_samples


def extend_segments(segments: Sequence[Segment], step: int, now: Segment) -> tuple[Segment, ...]:
    """Returns the segments of a run that resumes at a step.

    Args:
      segments: recorded segments. Some may begin after this step if newer checkpoints were lost.
      now: the new batch size, repeats and examples; its fields step and samples are ignored.
    """
    known = [segment for segment in segments if segment.step < step] or list(segments[:1])
    last = known[-1]
    if last.examples is None:
        last = known[-1] = last._replace(examples=now.examples)
    if last[2:] == now[2:]:
        return tuple(known)
    epochs, within = divmod(step * last.batch_size + last.offset, last.epoch_samples)
    samples = epochs * now.epoch_samples + within * now.epoch_samples // last.epoch_samples
    return (*known, now._replace(step=step, samples=samples))


def describe_change(before: Segment, now: Segment, step: int, epochs: int) -> str:
    """Describes a change of segment and its effect on the epochs, for the log."""
    changed = [f'{name} {getattr(before, name):,} -> {getattr(now, name):,}' for name in before._fields[2:]
               if getattr(before, name) != getattr(now, name)]
    left = max(epochs * now.epoch_samples - now.samples, 0) // now.batch_size
    counted = step * now.batch_size / now.epoch_samples
    return (f'{", ".join(changed)}: at step {step:,}, {before.epoch(step):.2f} epochs are trained. The run resumes at '
            f'epoch {now.epoch(step):.2f} of {epochs} (by the number of steps it would be {counted:.2f}) and trains '
            f'{left:,} more steps; learning rate and keep rate are those of that epoch')
