"""Jobs of launch/slurm.sh under a real Slurm: disturbed, they save, restart, and end with the same bits."""

import os
import signal

import pytest

from tests.helpers import faults
from tests.helpers.slurm import reason_to_skip

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())]
DISTURBANCES = {
    'requeue': ('scontrol', 'requeue', '{job}'),
    'sigterm': ('scancel', '--batch', '--signal=TERM', '{job}'),
    'preemption': ('sbatch', '--partition=high', '--nodes=2', '--exclusive', '--output=/dev/null', '--wrap=sleep 1')}
# Ends with 75 on SIGTERM, as evit_jax.main does after it saved.
STOPS_ON_SIGTERM = "#!/bin/bash\ntrap 'exit 75' TERM\necho started\nsleep 300 &\nwait\n"
DIES_ON_SIGTERM = '#!/bin/bash\necho started\nexec sleep 300\n'
CRASHES = '#!/bin/bash\nkill -s KILL $$\n'


@pytest.mark.parametrize('name', DISTURBANCES)
def test_job_that_is_disturbed_saves_restarts_and_ends_with_the_same_bits(name, slurm, submit, undisturbed):
    job = submit()
    job.wait_for_steps()
    slurm.run(*(word.format(job=job.number) for word in DISTURBANCES[name]))
    job.wait_for_restart()
    job.hurry()
    assert job.wait_for_end() == ('COMPLETED', '0:0', 1), job.log()[-3000:]
    faults.assert_same_end(job.workdir, undisturbed.workdir)
    log = job.log()
    assert log.count('srun ended with exit code 75') == 1 and log.count('saved at step') == 1
    assert 'continuing at step' in log and not (job.logs / 'evit.crashes').exists()


def test_job_that_reaches_its_time_limit_saves_restarts_and_ends_with_the_same_bits(submit, undisturbed):
    job = submit('--time=3', '--grace=60')  # Slurm sends the signal up to a minute earlier
    job.wait_for_restart()
    job.hurry()
    state, code, restarts = job.wait_for_end()
    assert (state, code) == ('COMPLETED', '0:0'), job.log()[-3000:]
    faults.assert_same_end(job.workdir, undisturbed.workdir)
    assert job.log().count('saved at step') == job.log().count('srun ended with exit code 75') == restarts


@pytest.mark.parametrize('index', [0, 1])
def test_job_with_a_killed_process_restarts_and_ends_with_the_same_bits(index, slurm, submit, undisturbed):
    job = submit()
    job.wait_for_steps()
    os.kill(slurm.tasks(job.number)[index], signal.SIGKILL)
    job.wait_for_restart()
    job.hurry()
    assert job.wait_for_end() == ('COMPLETED', '0:0', 1), job.log()[-3000:]
    faults.assert_same_end(job.workdir, undisturbed.workdir)
    crash, = (job.logs / 'evit.crashes').read_text().splitlines()
    assert crash.startswith(f'job {job.number} ended with exit code 137 after ')


def test_job_stopped_before_the_program_handles_signals_restarts_and_counts_no_crash(slurm, submit):
    job = submit('--restarts=0', program=DIES_ON_SIGTERM)
    slurm.wait(job.number, lambda _: job.log().count('started') == 2, 'start')
    slurm.run('scancel', '--batch', '--signal=TERM', job.number)
    job.wait_for_restart()
    assert not (job.logs / 'evit.crashes').exists()
    job.cancel()
    job.wait_for_end()


def test_job_whose_processes_always_crash_fails_after_its_restarts(submit):
    job = submit('--restarts=1', program=CRASHES)
    assert job.wait_for_end() == ('FAILED', '137:0', 1)
    assert len((job.logs / 'evit.crashes').read_text().splitlines()) == 2


def test_job_with_a_wrong_config_fails_once(submit):
    job = submit(overrides={'keep.rate': 7.0})
    assert job.wait_for_end() == ('FAILED', '2:0', 0)
    assert 'error: config.keep.rate=7.0' in job.log()


def test_cancel_ends_the_job_for_good(slurm, submit):
    job = submit(program=STOPS_ON_SIGTERM)
    slurm.wait(job.number, lambda _: job.log().count('started') == 2, 'start')
    job.cancel()
    state, code, restarts = job.wait_for_end()
    assert (state, restarts) == ('CANCELLED', 0)
    assert code in ('75:0', '143:0')  # that of the program, or of srun if SIGTERM reaches it first
