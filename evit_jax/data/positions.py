"""The position of a run in its data, counted in samples, so that it stays when a step takes another number of them.

A run is a row of segments. Within one, batch size and length of an epoch are the same. A run that goes on with another
batch size, other repeats or another number of examples begins a segment at the same place of the same epoch; the steps
are counted on. A run that never changes has one segment, and its step s begins with sample s * batch_size.
"""

from collections.abc import Sequence
from typing import NamedTuple

from evit_jax.data import order


class Segment(NamedTuple):
    """Steps with one batch size and epochs of one length."""

    step: int             # the first one
    samples: int          # before it, in epochs as long as those of this segment
    batch_size: int
    repeats: int
    examples: int | None  # None: not recorded, in a run of an older version

    @property
    def epoch_samples(self) -> int:
        return order.epoch_samples(self.examples, self.repeats)

    @property
    def offset(self) -> int:
        """Samples by which step s begins after sample s * batch_size."""
        return self.samples - self.step * self.batch_size

    def epoch(self, step: int) -> float:
        """The epochs that are done at a step."""
        return (step * self.batch_size + self.offset) / self.epoch_samples


def go_on(segments: Sequence[Segment], step: int, now: Segment) -> tuple[Segment, ...]:
    """The segments of a run that goes on at a step.

    Args:
      segments: those recorded so far; they may go further than this step, where newer checkpoints were lost.
      now: batch size, repeats and examples from here on; its step and samples are not used.
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
    """The change in epochs, in one sentence."""
    changed = [f'{name} {getattr(before, name):,} -> {getattr(now, name):,}' for name in before._fields[2:]
               if getattr(before, name) != getattr(now, name)]
    left = max(epochs * now.epoch_samples - now.samples, 0) // now.batch_size
    counted = step * now.batch_size / now.epoch_samples
    return (f'{", ".join(changed)}: at step {step:,}, {before.epoch(step):.2f} epochs are trained. The run goes on at '
            f'epoch {now.epoch(step):.2f} of {epochs} (by the number of steps it would be {counted:.2f}) and trains '
            f'{left:,} more steps; learning rate and keep rate are those of that epoch')
