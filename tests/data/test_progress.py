"""Tests of the progress bar."""

import io
import logging
import sys

import tqdm

from evit_jax.data.progress import Progress


def advance(monkeypatch, seconds, **arguments):
    """Advances a progress of 3,000 MB left by 20 MB per second."""
    clock = [0.0]
    monkeypatch.setattr(tqdm.std, 'time', lambda: clock[0])
    with Progress('copying', 4000, 'MB', **arguments) as progress:
        for _ in range(seconds):
            clock[0] += 1
            progress.add(20)


def test_progress_in_a_log_writes_rate_and_time_left_every_five_seconds(monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        advance(monkeypatch, 12, initial=1000)
    assert [record.getMessage() for record in caplog.records] == [
        'copying: 1.10k of 4.00k MB, 20.0 MB/s, 02:25 left', 'copying: 1.20k of 4.00k MB, 20.0 MB/s, 02:20 left']


def test_progress_of_short_work_writes_nothing_to_the_log(monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        advance(monkeypatch, 4)
    assert not caplog.records


def test_progress_on_a_terminal_draws_a_bar_and_removes_it(monkeypatch, caplog):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, 'stderr', terminal)
    with caplog.at_level(logging.INFO):
        advance(monkeypatch, 4)
    assert 'copying:' in terminal.getvalue() and '20.0 MB/s' in terminal.getvalue()
    assert terminal.getvalue().endswith('\r') and not caplog.records
