"""Fixtures: a Slurm whose nodes have a GPU, and trainings on two of its nodes."""

import pytest

from tests.helpers.slurm import Slurm
from tests.helpers.slurm_job import TWO_NODES, Job


@pytest.fixture(scope='session')
def slurm(tmp_path_factory):
    with Slurm(tmp_path_factory.mktemp('slurm')) as slurm:
        yield slurm


@pytest.fixture(scope='session')
def undisturbed(slurm, tmp_path_factory):
    """A job that ran to its end on two nodes."""
    job = Job(slurm, tmp_path_factory.mktemp('undisturbed'), *TWO_NODES)
    job.hurry()
    state = job.wait_for_end()
    assert state == ('COMPLETED', '0:0', 0), job.log()[-3000:]
    return job


@pytest.fixture
def submit(slurm, tmp_path):
    """Returns a function that submits a training on two nodes, with more options of slurm.sh."""
    return lambda *options, **changes: Job(slurm, tmp_path, *TWO_NODES, *options, **changes)
