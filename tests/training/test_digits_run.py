"""What `make train` does, to its end: it reaches its accuracy, keeps the object sooner than the rest, and needs it."""

import os
import subprocess
import sys

import numpy as np
import pytest

from configs import digits
from evit_jax.checkpoints.manager import CheckpointManager
from evit_jax.metrics import writers
from evit_jax.runtime import sharding
from evit_jax.training import experiment
from evit_jax.training.evaluation import evaluate, object_patches
from tests.training.test_training import ROOT

pytestmark = pytest.mark.slow
GREY = 128


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('digits')
    one_device = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    subprocess.run([sys.executable, '-m', 'evit_jax.main', '--config', 'configs/digits.py', '--workdir', str(workdir)],
                   cwd=ROOT, env=one_device, check=True)
    return workdir, digits.get_config(), writers.read_metrics(workdir / 'metrics.jsonl')[-1]


def test_the_recipe_reaches_95_percent_at_keep_rate_07_and_keeps_the_object(trained):
    workdir, config, metrics = trained
    assert config.keep.rate == 0.7 and config.model.fuse
    assert max(metrics['eval/top1'], metrics['eval/top1_ema']) >= 0.95
    for stage in (1, 2, 3):
        assert metrics[f'eval/object_kept_{stage}'] > metrics[f'eval/random_kept_{stage}']
    assert (workdir / 'kept.png').exists() and (workdir / 'curves.png').exists()


def accuracy_without(trained, hide):
    """Top-1 when half of the patches are grey: those of which `hide(random draw, on the object)` is least."""
    workdir, config, _ = trained
    laid = experiment.setup(config)
    checkpoints = CheckpointManager(workdir, keep=config.checkpoint.keep)
    state, step, rng = checkpoints.restore(laid.abstract_state()), laid.eval_step(), np.random.default_rng(0)
    checkpoints.close()

    def greyed(batches):
        for batch in batches:
            batch.pop('failed')
            order = hide(rng.random((len(batch['image']), laid.patches)), object_patches(batch['mask'], laid.patches))
            hidden = order.argsort(1).argsort(1) < laid.patches // 2
            side, patch = round(laid.patches**0.5), laid.model.config.patch_size
            pixels = hidden.reshape(-1, side, side).repeat(patch, 1).repeat(patch, 2)
            yield batch | {'image': np.where(pixels[..., None], np.uint8(GREY), batch['image'])}

    batches = experiment.held_out_batches(laid)
    found = evaluate(lambda batch: step(state.ema, batch, laid.plan), greyed(batches),
                     lambda batch: sharding.shard_batch(batch, laid.mesh), patches=laid.patches)
    batches.close()
    return found.metrics['top1']


def test_half_of_the_patches_at_random_is_clearly_not_enough_but_half_off_the_object_hides_little(trained):
    whole = trained[2]['eval/top1_ema']
    at_random = accuracy_without(trained, lambda draw, on_object: draw)
    off_object = accuracy_without(trained, lambda draw, on_object: draw + on_object)
    print(f'top-1 {whole:.3f}; half hidden at random {at_random:.3f}, off the object {off_object:.3f}')
    assert at_random < whole - 0.2
    assert off_object > at_random + 0.2
