"""Logs the progress of work that takes minutes."""

import io

from absl import logging
from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 5.0
_LINE = '{desc}: {n_fmt} of {total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left'


class Progress(tqdm):
    """Logs progress, rate and remaining time every five seconds.

    A redrawn bar would garble the log and the results that programs print.

    Args:
      description: name of the work, such as 'reading'.
      total: amount of work.
      unit: unit of the amounts, such as 'images'.
      initial: amount of work already done.
    """
    monitor_interval = 0  # disables the thread of tqdm that redraws bars

    def __init__(self, description: str, total: float, unit: str, initial: float = 0):
        super().__init__(desc=description, total=total, unit=f' {unit}', initial=initial, unit_scale=True, leave=False,
                         file=_Log(), bar_format=_LINE, delay=_SECONDS_BETWEEN_LINES, smoothing=0, miniters=0,
                         mininterval=_SECONDS_BETWEEN_LINES)

    def add(self, amount: float) -> None:
        """Adds to the amount of work done."""
        self.update(amount)


class _Log(io.TextIOBase):
    """File that writes each line of tqdm to the log."""

    def write(self, text: str) -> int:
        if line := text.strip():
            logging.info('%s', line)
        return len(text)
