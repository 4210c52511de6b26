"""Counts and logs unreadable examples, and stops the run if there are too many."""

from collections.abc import Iterable, Iterator

from absl import logging

from evit_jax.runtime import distributed

_MAX_LOGGED = 20  # number of examples that are logged one by one; then the count is logged each time it has doubled


class Failures:
    """Removes `failed` from the batches of one pipeline, and counts and logs its entries.

    Attributes:
      num_failed: number of unreadable samples in this process.
      num_samples: number of all samples in this process, including unreadable ones.
    """

    def __init__(self, limit: float, examples: int):
        """Sets the limit.

        Args:
          limit: maximum fraction of unreadable samples, in [0, 1]. During the first pass over the data it is a fraction
            of the whole pass; later, of all samples so far.
          examples: number of examples in one pass, over all processes.

        Raises:
          ValueError: the limit is outside [0, 1].
        """
        if not 0 <= limit <= 1:
            raise ValueError(f'data.max_failed={limit} is outside [0, 1]')
        self.num_failed, self.num_samples = 0, 0
        self._limit, self._examples = limit, examples
        self._last = ''
        self._logged: set[str] = set()
        self._next_logged = 2 * _MAX_LOGGED

    def take(self, batch: dict) -> dict:
        """Removes the unreadable examples, `failed`, from a batch, and counts and logs them. Returns the batch.

        Raises:
          ValueError: too many samples have failed. If there are several processes, only `check` raises this error, so
            that they all stop at the same step.
        """
        failed = batch['failed'].tolist()
        self.num_failed += len(failed)
        self.num_samples += int((batch['index'] >= 0).sum()) if 'index' in batch else len(batch['label'])
        self._log(failed)
        if distributed.is_single_process():
            self.check()
        return {name: value for name, value in batch.items() if name != 'failed'}

    def checked(self, batches: Iterable[dict]) -> Iterator[dict]:
        """Yields each batch as `take` returns it, and calls `check` after the last one."""
        yield from map(self.take, batches)
        self.check()

    def check(self) -> None:
        """Compares the counts, summed over all processes, with the limit. All processes must call it at the same step.

        Raises:
          ValueError: more samples have failed than the limit allows.
        """
        totals = distributed.sum_over_processes({'failed': self.num_failed, 'samples': self.num_samples})
        allowed = int(self._limit * max(totals['samples'], self._examples))
        if totals['failed'] > allowed:
            last = f'the last one {self._last!r}' if self._last else 'none of them in this process'
            raise ValueError(f'{totals["failed"]:.0f} of {totals["samples"]:.0f} samples could not be read, {last}; '
                             f'data.max_failed={self._limit} allows {allowed}: repair the files or raise it')

    def _log(self, failed):
        self._last = failed[-1] if failed else self._last
        for message in dict.fromkeys(failed):
            if message not in self._logged and len(self._logged) < _MAX_LOGGED:
                self._logged.add(message)
                logging.warning('cannot be read: %s%s', message,
                                '; further ones are only counted' if len(self._logged) == _MAX_LOGGED else '')
        if self.num_failed >= self._next_logged:
            logging.warning('%d of %d samples could not be read so far', self.num_failed, self.num_samples)
            self._next_logged = 2 * self.num_failed
