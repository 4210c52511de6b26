"""Progress bar for work that takes minutes."""

import io
import sys

from absl import logging
from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 5.0
_LINE = '{desc}: {n_fmt} of {total_fmt}{unit}, {rate_fmt}, {remaining} left'


class Progress(tqdm):
    """Reports progress, rate and remaining time: a bar on a terminal, a line every five seconds in a log.

    Args:
      description: what is being done, such as 'reading'.
      total: amount of work.
      unit: unit of the amounts, such as 'images'.
      initial: amount that was done before.
    """
    monitor_interval = 0  # no thread that redraws

    def __init__(self, description: str, total: float, unit: str, initial: float = 0):
        on_terminal = sys.stderr.isatty()
        seconds, layout, file = (0.1, None, sys.stderr) if on_terminal else (_SECONDS_BETWEEN_LINES, _LINE, _Log())
        super().__init__(desc=description, total=total, unit=f' {unit}', initial=initial, unit_scale=True, leave=False,
                         file=file, bar_format=layout, delay=seconds, mininterval=seconds, miniters=0, smoothing=0)

    def add(self, amount: float) -> None:
        """Adds to the amount of work done."""
        self.update(amount)


class _Log(io.TextIOBase):
    """File that writes each line of tqdm to the log."""

    def write(self, text: str) -> int:
        if line := text.strip():
            logging.info('%s', line)
        return len(text)
