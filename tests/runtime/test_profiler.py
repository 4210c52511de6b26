"""The profiler traces the requested steps."""

import pathlib

import jax
import pytest

from evit_jax.runtime import storage
from evit_jax.runtime.profiler import StepProfiler, parse_steps


def test_parse_steps_reads_a_range_and_refuses_other_text():
    assert parse_steps('10:20') == range(10, 20) and not parse_steps('')
    for wrong in ('10', '20:10', '5:5', 'a:b', '-1:4'):
        with pytest.raises(ValueError, match=r'config.profile_steps=.* names no steps: give FIRST:END'):
            parse_steps(wrong)


def test_profiler_traces_the_requested_steps_and_no_others(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: calls.append(f'start {folder}'))
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append('stop'))
    profiler = StepProfiler(range(2, 4), tmp_path)
    for step in range(6):
        profiler.before(step)
        calls.append(step)
        profiler.after(step, ())
    profiler.close()
    assert calls == [0, 1, f'start {tmp_path / "profile"}', 2, 3, 'stop', 4, 5]


def test_profiler_in_a_bucket_traces_to_a_local_folder_and_uploads_it(tmp_path, monkeypatch):
    folders = []

    def trace(folder):
        folders.append(pathlib.Path(folder))
        (folders[0] / 'plugins').mkdir()
        (folders[0] / 'plugins' / 'host.xplane.pb').write_bytes(b'trace')

    monkeypatch.setattr(jax.profiler, 'start_trace', trace)
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: None)
    profiler = StepProfiler(range(1), tmp_path)
    monkeypatch.setattr(storage, 'is_remote', lambda path: True)
    profiler.before(0)
    profiler.after(0, ())
    assert (tmp_path / 'profile' / 'plugins' / 'host.xplane.pb').read_bytes() == b'trace'
    assert folders[0] != tmp_path / 'profile' and not folders[0].exists()
