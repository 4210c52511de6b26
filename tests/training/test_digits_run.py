"""A complete run of the digits recipe: its accuracy, and the importance of the patches on the object."""

import os
import subprocess
import sys

import numpy as np
import pytest

from evit_jax.checkpoints.manager import CheckpointManager
from evit_jax.configs import digits
from evit_jax.metrics import writers
from evit_jax.runtime import sharding
from evit_jax.training import experiment
from evit_jax.training.evaluation import evaluate, object_patches
from tests.helpers.tiny_run import ROOT

pytestmark = pytest.mark.slow
GREY = 128


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('digits')
    one_device = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    subprocess.run([sys.executable, '-m', 'evit_jax.main', '--config', 'configs/digits.py', '--workdir', str(workdir)],
                   cwd=ROOT, env=one_device, check=True)
    return workdir, digits.get_config(), writers.read_metrics(workdir / 'metrics.jsonl')[-1]


def test_digits_recipe_reaches_95_percent_at_keep_rate_07_and_keeps_the_object(trained):
    workdir, config, metrics = trained
    assert config.keep.rate == 0.7 and config.model.fuse
    assert max(metrics['eval/top1'], metrics['eval/top1_ema']) >= 0.95
    for stage in (1, 2, 3):
        assert metrics[f'eval/object_kept_{stage}'] > metrics[f'eval/random_kept_{stage}']
    assert (workdir / 'kept.png').exists() and (workdir / 'curves.png').exists()


def accuracy_without(trained, rank):
    """Returns top-1 with half of the patches grey: those with the smallest `rank(random number, is on the object)`."""
    workdir, config, _ = trained
    run = experiment.setup(config)
    checkpoints = CheckpointManager(workdir, keep=config.checkpoint.keep)
    state, step, rng = checkpoints.restore(run.abstract_state()), run.eval_step(), np.random.default_rng(0)
    checkpoints.close()

    def greyed(batches):
        for batch in batches:
            batch.pop('failed')
            order = rank(rng.random((len(batch['image']), run.patches)), object_patches(batch['mask'], run.patches))
            hidden = order.argsort(1).argsort(1) < run.patches // 2
            side, patch = round(run.patches**0.5), run.model.config.patch_size
            pixels = hidden.reshape(-1, side, side).repeat(patch, 1).repeat(patch, 2)
            yield batch | {'image': np.where(pixels[..., None], np.uint8(GREY), batch['image'])}

    batches = run.eval_batches()
    result = evaluate(lambda batch: step(state.ema, batch, run.plan), greyed(batches),
                      lambda batch: sharding.shard_batch(batch, run.mesh), patches=run.patches)
    batches.close()
    return result.metrics['top1']


def test_accuracy_falls_with_random_patches_hidden_but_not_with_background_hidden(trained):
    whole = trained[2]['eval/top1_ema']
    at_random = accuracy_without(trained, lambda draw, on_object: draw)
    off_object = accuracy_without(trained, lambda draw, on_object: draw + on_object)
    print(f'top-1 {whole:.3f}; half hidden at random {at_random:.3f}, off the object {off_object:.3f}')
    assert at_random < whole - 0.2
    assert off_object > at_random + 0.2
