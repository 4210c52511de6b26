"""Jobs of launch/slurm.sh under a real Slurm: their losses, logs and resources."""

import re

import numpy as np
import pytest

from tests.helpers import layouts
from tests.helpers.slurm import Slurm, reason_to_skip
from tests.helpers.slurm_job import SETTINGS, Job

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())]


def test_two_nodes_train_to_the_losses_of_one_process(undisturbed, tmp_path):
    changes = {key.replace('.', '__'): value for key, value in SETTINGS.items()}
    with pytest.MonkeyPatch.context() as patch:
        layouts.prepare(patch)
        layouts.train_here(tmp_path / 'run', **changes)
    np.testing.assert_allclose(layouts.losses(undisturbed.workdir), layouts.losses(tmp_path / 'run'), rtol=1e-5)


def test_log_and_workdir_are_at_the_given_paths(undisturbed):
    assert [path.name for path in undisturbed.logs.iterdir()] == ['evit.log']
    assert {'config.json', 'metrics.jsonl', 'checkpoints', 'curves.png'} <= {
        path.name for path in undisturbed.workdir.iterdir()}


def test_log_has_the_progress_lines_of_process_zero_alone(undisturbed):
    steps = re.findall(r'\] step (\d+)/', undisturbed.log())
    assert steps == [str(step + 1) for step in range(len(steps))] and len(steps) == 40
    assert re.findall(r'\] process (\d) of 2', undisturbed.log()) == ['0']
    writers = set(re.findall(r'^I\d{4} [\d:.]+ +(\d+) (?:trainer|loop|step_timer)\.py', undisturbed.log(), re.M))
    assert len(writers) == 1


def test_job_on_nodes_without_gpus_runs_one_process_per_node(tmp_path_factory):
    with Slurm(tmp_path_factory.mktemp('slurm'), gpus=False) as slurm:
        job = Job(slurm, tmp_path_factory.mktemp('job'), '--nodes=2', '--gpus-per-node=0', '--cpus-per-process=2',
                  overrides={'epochs': 1})
        job.hurry()
        assert job.wait_for_end() == ('COMPLETED', '0:0', 0), job.log()[-3000:]
        fields = slurm.job(job.number)
    assert (fields['NumTasks'], fields['NumCPUs']) == ('2', '4') and 'gpu' not in str(fields)
    assert len(layouts.losses(job.workdir)) == 8
