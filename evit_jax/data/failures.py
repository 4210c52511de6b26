"""What could not be read: named in the log, counted, and too much when it is more than a share of the data."""

from absl import logging

_NAMED = 20  # files that get a line of their own; after them a line at each doubling


class Failures:
    """Takes `failed` off the batches of one pipeline.

    Attributes:
      count: samples that could not be shown so far.
      seen: samples so far, with those.
    """

    def __init__(self, limit: float, examples: int):
        """Sets the limit.

        Args:
          limit: share of the samples, 0 to 1, that may fail: of one pass over the examples, and later of all seen.
          examples: of this process, in one pass.
        """
        if not 0 <= limit <= 1:
            raise ValueError(f'data.max_failed={limit} is outside [0, 1]')
        self.count, self.seen = 0, 0
        self._limit, self._examples = limit, examples
        self._named: set[str] = set()
        self._next = 2 * _NAMED

    def take(self, batch: dict) -> dict:
        """The batch without `failed`.

        Raises:
          ValueError: more have failed than the limit allows.
        """
        failed = batch['failed'].tolist()
        self.count += len(failed)
        self.seen += int((batch['index'] >= 0).sum()) if 'index' in batch else len(batch['label'])
        self._log(failed)
        allowed = int(self._limit * max(self.seen, self._examples))
        if self.count > allowed:
            raise ValueError(f'{self.count} of {self.seen} samples could not be read, the last one {failed[-1]!r}; '
                             f'data.max_failed={self._limit} allows {allowed}: mend the files or raise it')
        return {name: value for name, value in batch.items() if name != 'failed'}

    def _log(self, failed):
        for said in dict.fromkeys(failed):
            if said not in self._named and len(self._named) < _NAMED:
                self._named.add(said)
                logging.warning('cannot be read: %s%s', said,
                                '; more of them are only counted' if len(self._named) == _NAMED else '')
        if self.count >= self._next:
            logging.warning('%d of %d samples could not be read so far', self.count, self.seen)
            self._next = 2 * self.count
