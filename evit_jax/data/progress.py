"""Lines in the log about work that takes minutes."""

import time

from absl import logging

_BETWEEN_LINES = 5.0  # seconds


class Progress:
    """Says in the log, every few seconds, how far something is, how fast it goes and how long it will take."""

    def __init__(self, what: str, total: float, unit: str, done: float = 0):
        self._what, self._total, self._unit, self._done = what, total, unit, done
        self._began = self._said = time.monotonic()
        self._before = done

    def add(self, amount: float) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._said >= _BETWEEN_LINES:
            self._said = now
            rate = (self._done - self._before) / (now - self._began)
            left = (self._total - self._done) / rate if rate else float('inf')
            logging.info('%s: %s of %s %s, %s a second, %s left', self._what, *(
                f'{number:,.0f}' if number >= 10 else f'{number:.2g}' for number in (self._done, self._total)),
                self._unit, f'{rate:,.0f}' if rate >= 10 else f'{rate:.2g}', _duration(left))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'
