"""What could not be read: named in the log, counted, and too much when it is more than a share of the data."""

from collections.abc import Iterable, Iterator

from absl import logging

from evit_jax.runtime import distributed

_NAMED = 20  # files that get a line of their own; after them a line at each doubling


class Failures:
    """Takes `failed` off the batches of one pipeline.

    Attributes:
      count: samples of this process that could not be shown so far.
      seen: samples of this process so far, with those.
    """

    def __init__(self, limit: float, examples: int):
        """Sets the limit.

        Args:
          limit: share of the samples, 0 to 1, that may fail: of one pass over the examples, and later of all seen.
          examples: in one pass of all processes.
        """
        if not 0 <= limit <= 1:
            raise ValueError(f'data.max_failed={limit} is outside [0, 1]')
        self.count, self.seen = 0, 0
        self._limit, self._examples = limit, examples
        self._last = ''
        self._named: set[str] = set()
        self._next = 2 * _NAMED

    def take(self, batch: dict) -> dict:
        """The batch without `failed`, which are counted and named.

        Raises:
          ValueError: as `check` does; but one process of several goes on, until all of them check.
        """
        failed = batch['failed'].tolist()
        self.count += len(failed)
        self.seen += int((batch['index'] >= 0).sum()) if 'index' in batch else len(batch['label'])
        self._log(failed)
        if distributed.is_single_process():
            self.check()
        return {name: value for name, value in batch.items() if name != 'failed'}

    def checked(self, batches: Iterable[dict]) -> Iterator[dict]:
        """All the batches, each taken, and a check behind the last one."""
        yield from map(self.take, batches)
        self.check()

    def check(self) -> None:
        """Holds what all processes counted against the limit; they call this at the same point, and stop together.

        Raises:
          ValueError: more have failed than the limit allows.
        """
        found = distributed.sum_over_processes({'count': self.count, 'seen': self.seen})
        allowed = int(self._limit * max(found['seen'], self._examples))
        if found['count'] > allowed:
            last = f'the last one {self._last!r}' if self._last else 'none of them in this process'
            raise ValueError(f'{found["count"]:.0f} of {found["seen"]:.0f} samples could not be read, {last}; '
                             f'data.max_failed={self._limit} allows {allowed}: mend the files or raise it')

    def _log(self, failed):
        self._last = failed[-1] if failed else self._last
        for said in dict.fromkeys(failed):
            if said not in self._named and len(self._named) < _NAMED:
                self._named.add(said)
                logging.warning('cannot be read: %s%s', said,
                                '; more of them are only counted' if len(self._named) == _NAMED else '')
        if self.count >= self._next:
            logging.warning('%d of %d samples could not be read so far', self.count, self.seen)
            self._next = 2 * self.count
