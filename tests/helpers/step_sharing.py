"""Shares the jitted training steps among the runs of the suite, so that a step is traced and compiled once."""

import contextlib

import pytest

from evit_jax.data.transforms import mixing
from evit_jax.training.experiment import Experiment

UNUSED = ('checkpoint', 'compilation_cache', 'init_ema', 'init_from', 'log')  # keys of the config that no step uses


@contextlib.contextmanager
def shared():
    """Shares the training steps of equal runs. `mixing.mix_batch` is compared too, because tests patch it."""
    train_step, steps = Experiment.train_step, {}

    def shared_train_step(run, teacher=None):
        config = {name: value for name, value in run.config.to_dict().items() if name not in UNUSED}
        key = (str(config), run.model, run.mesh, run.patches, run.offset, run.total_steps, run.steps_per_epoch,
               mixing.mix_batch)
        if teacher:
            key += teacher.model.config, teacher.plan, teacher.mean, teacher.std, teacher.patch_tokens
        if key not in steps:
            steps[key] = train_step(run, teacher)
        return steps[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, 'train_step', shared_train_step)
        yield
