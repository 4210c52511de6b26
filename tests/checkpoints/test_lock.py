"""The lock of a workdir: one run at a time, and the lock of a dead run is free."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from evit_jax.checkpoints.lock import IN_USE_FILE, WorkdirLock
from evit_jax.runtime import file_lock

ROOT = pathlib.Path(__file__).parents[2]
BEAT = 0.8           # seconds; long enough that a busy machine misses no two heartbeats
WAIT = 2.25 * BEAT
# A second argument makes flock fail, as on a file system without locks.
HOLD = f'''
import errno, fcntl, sys, time
def no_locks(*arguments):
    raise OSError(errno.ENOLCK, 'No locks available')
if len(sys.argv) > 2:
    fcntl.flock = no_locks
from evit_jax.checkpoints.lock import WorkdirLock
with WorkdirLock(sys.argv[1], beat_seconds={BEAT}):
    print('held', flush=True)
    sys.stdin.readline()
'''


@pytest.fixture(params=['locks', 'no locks'])
def holder(request, tmp_path, monkeypatch):
    """A process that holds `tmp_path` until it reads a line or is killed."""
    more = []
    if request.param == 'no locks':
        more = without_locks(monkeypatch)
    process = subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path), *more], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == 'held\n'
    yield process
    process.kill()
    process.communicate()


def without_locks(monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(file_lock.fcntl, 'flock', refuse)
    return ['no locks']


def test_lock_held_by_another_process_is_refused_and_its_owner_named(holder, tmp_path):
    with pytest.raises(ValueError, match=rf'workdir {tmp_path} is in use by another run \(process {holder.pid} on '
                                         rf'{os.uname().nodename}, since 20.*\): .*--workdir') as refusal, \
            WorkdirLock(tmp_path, beat_seconds=BEAT):
        pass
    assert '\n' not in str(refusal.value)
    assert holder.poll() is None


def test_lock_after_a_run_that_ended_is_free_at_once_and_leaves_no_file(holder, tmp_path):
    holder.communicate('\n')
    assert holder.returncode == 0
    assert not list(tmp_path.iterdir())
    begin = time.monotonic()
    with WorkdirLock(tmp_path, beat_seconds=BEAT):
        assert time.monotonic() - begin < WAIT


def test_lock_after_a_killed_run_is_taken(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / IN_USE_FILE).read_text())['pid'] == holder.pid
    with WorkdirLock(tmp_path, beat_seconds=0.1):  # the holder is dead: no need to wait for its heartbeats
        assert json.loads((tmp_path / IN_USE_FILE).read_text())['pid'] == os.getpid()


def test_lock_taken_again_in_the_same_process_is_free(tmp_path):
    for _ in range(2):
        with contextlib.ExitStack() as held:
            held.enter_context(WorkdirLock(tmp_path))


def test_lock_after_an_error_is_free(tmp_path):
    with pytest.raises(FloatingPointError), WorkdirLock(tmp_path):
        raise FloatingPointError
    assert not list(tmp_path.iterdir())


def test_lock_of_a_killed_run_with_a_living_child_is_free(tmp_path):
    code = f"""
import os, time
from evit_jax.checkpoints.lock import WorkdirLock
with WorkdirLock({str(tmp_path)!r}):
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        with WorkdirLock(tmp_path):
            os.kill(child, 0)  # raises an error if the child is dead
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_lock_of_two_starts_at_the_same_moment_without_flock_is_held_by_one(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    start, entered, refused = threading.Barrier(2, timeout=30), threading.Barrier(2, timeout=30), []

    def run():
        start.wait()
        try:
            with WorkdirLock(tmp_path, beat_seconds=BEAT):
                entered.wait()
        except ValueError:
            refused.append(True)
            entered.wait()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused == [True]


def test_lock_taken_over_by_another_run_interrupts_this_one_and_keeps_its_file(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    others = b'{"host": "elsewhere", "pid": 7, "since": "today", "run": "another"}'
    try:
        with pytest.raises(ValueError, match=r'process 7 on elsewhere, since today.*took over'), \
                WorkdirLock(tmp_path, beat_seconds=0.2):
            (tmp_path / IN_USE_FILE).write_bytes(others)
            time.sleep(60)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (tmp_path / IN_USE_FILE).read_bytes() == others


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_lock_in_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=f'workdir {tmp_path}/run cannot be written'), WorkdirLock(tmp_path / 'run'):
        pass


def test_lock_on_a_full_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(ValueError, match=f'workdir {tmp_path} has 1 MiB free, a run needs at least 64: make room'), \
            WorkdirLock(tmp_path):
        pass


def test_lock_of_a_file_is_refused(tmp_path):
    (tmp_path / 'run').touch()
    with pytest.raises(ValueError, match=f'workdir {tmp_path}/run cannot be written'), WorkdirLock(tmp_path / 'run'):
        pass
