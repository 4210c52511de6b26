"""Tests of progress in the log."""

import logging

import tqdm

from evit_jax.data.progress import Progress


def advance(monkeypatch, seconds, **arguments):
    """Advances a progress with 3,000 MB left, at 20 MB per second."""
    clock = [0.0]
    monkeypatch.setattr(tqdm.std, 'time', lambda: clock[0])
    with Progress('copying', 4000, 'MB', **arguments) as progress:
        for _ in range(seconds):
            clock[0] += 1
            progress.add(20)


def test_progress_logs_rate_and_time_left_every_five_seconds(monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        advance(monkeypatch, 12, initial=1000)
    assert [record.getMessage() for record in caplog.records] == [
        'copying: 1.10k of 4.00k MB, 20.0 MB/s, 02:25 left', 'copying: 1.20k of 4.00k MB, 20.0 MB/s, 02:20 left']


def test_progress_of_short_work_logs_nothing(monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        advance(monkeypatch, 4)
    assert not caplog.records


def test_progress_that_is_not_closed_logs_no_more_lines(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(tqdm.std, 'time', lambda: clock[0])
    with caplog.at_level(logging.INFO):
        progress = Progress('reading', 10, 'images')
        clock[0] = 6.0
        progress.add(4)
        del progress
    assert [record.getMessage() for record in caplog.records] == [
        'reading: 4.00 of 10.0 images, 0.67 images/s, 00:09 left']
