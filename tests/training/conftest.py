"""A run that several test files share. They must not change its workdir."""

import pytest

from tests.helpers import layouts


@pytest.fixture(scope='session')
def shared_run(tmp_path_factory):
    """Workdir of the training of `layouts`, on the 8 devices of this process."""
    workdir = tmp_path_factory.mktemp('shared') / '1x8'
    layouts.train_here(workdir)
    return workdir
