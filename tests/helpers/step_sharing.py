"""Shares the jitted steps among the runs of a test file, so that a step is traced and compiled once for a config."""

import pytest

from evit_jax.training.experiment import Experiment

UNUSED = ('checkpoint', 'compilation_cache', 'init_ema', 'init_from', 'log')  # keys of the config that no step uses


@pytest.fixture(scope='module', autouse=True)
def shared_steps():
    """Shares the steps within a test file that defines `shared_steps = step_sharing.shared_steps`.

    A file whose tests change by a patch what a step computes cannot use it.
    """
    train_step, eval_step, steps = Experiment.train_step, Experiment.eval_step, {}

    def shared(key, make_step):
        if key not in steps:
            steps[key] = make_step()
        return steps[key]

    def shared_train_step(run, teacher=None):
        config = {name: value for name, value in run.config.to_dict().items() if name not in UNUSED}
        key = ('train', str(config), run.model.config, run.model.modules, run.mesh, run.offset, run.total_steps,
               run.steps_per_epoch)
        if teacher:
            key += teacher.model.config, teacher.plan, teacher.mean, teacher.std, teacher.patch_tokens
        return shared(key, lambda: train_step(run, teacher))

    def shared_eval_step(run):
        config = run.config
        key = ('eval', str(config.model), tuple(config.data.mean), tuple(config.data.std), config.sharding,
               run.model.config, run.model.modules, run.mesh)
        return shared(key, lambda: eval_step(run))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, 'train_step', shared_train_step)
        patch.setattr(Experiment, 'eval_step', shared_eval_step)
        yield
