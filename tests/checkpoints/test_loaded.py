"""Loaded weights: their token plans, and the folders from which they are read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax import models
from evit_jax.checkpoints import weights
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.best import BestCheckpoint
from evit_jax.checkpoints.loaded import load_model, saved_budget
from evit_jax.checkpoints.manager import CheckpointManager
from evit_jax.checkpoints.model_digest import digest_of_architecture, digest_of_weights
from evit_jax.reduction.budget import TokenBudget
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.reduction.reducers import EVIT
from evit_jax.reduction.registry import get_reducer
from tests.helpers import layouts, tiny
from tests.helpers.weights import random_params


@pytest.fixture(scope='module')
def loaded():
    return tiny.model().loaded


@pytest.mark.parametrize('budget, message', [
    ({'keep_rate': 1.5}, r'keep rate 1.5 is outside \(0, 1\]'), ({'keep_rate': 0.0}, 'keep rate 0.0'),
    ({'keep_rates': (0.5, 0.5)}, r'2 values for 1 reductions'), ({'tokens': (0,)}, '0 tokens cannot be kept'),
    ({'macs': 1.5}, 'of the MACs is outside'), ({'macs': 0.1}, 'fewer cannot be reached'),
    ({'keep_rate': 0.5, 'tokens': (3,)}, 'only one of keep rate and tokens'),
    ({'plan': make_plan(64, 2, reduce_at=())}, '64 patches and 2 blocks, the model has 16 patches'),
    ({'keep_rates': '0.5,0.7'}, "keep_rates='0.5,0.7' is no sequence"), ({'keep_rates': 0.5}, 'is no sequence'),
    ({'tokens': '9'}, 'is no sequence: give a number for each reduction'), ({'tokens': 9}, r'as tokens=\(137, 96\)'),
    ({'r': 2}, 'evit merges none'), ({'r': (2, 1)}, 'r=2-1 is a count of merged tokens, and evit merges none'),
    ({'r': '2-1'}, r"r='2-1' is no sequence: give a number for each block, as r=\(39, 31, 24\)"),
    ({'r': (2, 1), 'macs': 0.5}, 'only one of r and macs')])
def test_plan_out_of_range_is_refused(loaded, budget, message):
    with pytest.raises(ValueError, match=message):
        loaded.plan(**budget)


def test_plan_given_as_an_object_is_used_exactly(loaded):
    ranking = make_plan(16, 2, reduce_at=())._replace(keep=(16, 16), fused=False)
    for plan in (make_plan(16, 2, tokens=(9, 4), reduce_at=(0, 1)), ranking):
        assert loaded.plan(plan=plan) == plan
    assert loaded.with_plan(plan=make_plan(16, 2, tokens=(9, 4), reduce_at=(0, 1))).plan().counts == (10, 5)


def test_plan_of_a_rate_for_a_model_without_reductions_is_refused(loaded):
    dense = loaded._replace(budget=loaded.budget._replace(reduce_at=(), rates=()))
    assert not dense.plan().reductions
    with pytest.raises(ValueError, match=r'drops nothing at any block .* leave keep rate out'):
        dense.plan(keep_rate=0.5)


def test_load_model_reads_the_newest_the_best_and_the_moving_average(tmp_path):
    run = layouts.setup(keep__rates=(0.75,))
    state = run.new_state()
    state = state._replace(step=jnp.int32(7), ema=jax.tree.map(lambda leaf: leaf + 1, state.ema))
    workdirs.write_config(tmp_path, run.metadata)
    checkpoints, best = CheckpointManager(tmp_path, keep=1), BestCheckpoint(tmp_path, 'top1')
    checkpoints.save(state, run.metadata)
    best.offer(state._replace(step=jnp.int32(3)), {'top1': 0.5}, run.metadata)
    checkpoints.close()
    best.close()
    newest, average, top = load_model(tmp_path), load_model(tmp_path, ema=True), load_model(tmp_path / 'best')
    jax.tree.map(np.testing.assert_array_equal, newest.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, average.params, state.ema)
    assert (newest.path, newest.name, newest.step, top.step) == (str(tmp_path), 'vit_layouts', 7, 3)
    assert (newest.eval_crop, newest.class_names) == (1.0, tiny.NAMES)
    assert newest.plan() == make_plan(16, 2, rate=0.75, reduce_at=(1,))


def test_load_model_with_a_partial_config_has_the_values_of_deit(tmp_path):
    config = dataclasses.replace(models.get_config('vit_digits'), classes=1000)
    params = random_params(models.create(config))
    weights.save(tmp_path, params, {'config': {'model': {'name': 'vit_digits', 'reduce_at': (1,)}}, 'class_names': []})
    loaded = load_model(tmp_path)
    assert (loaded.mean, loaded.eval_crop, loaded.budget.rates) == ((0.485, 0.456, 0.406), 0.875, (1.0,))
    assert loaded.class_names[207] == 'golden retriever'  # 1,000 classes
    with pytest.raises(ValueError, match='holds no moving average'):
        load_model(tmp_path, ema=True)
    weights.save(tmp_path / 'other', params, {'config': {'model': {'name': 'vit_digits'}}, 'class_names': tiny.NAMES})
    with pytest.raises(ValueError, match='names 3 classes, its model has 1000'):
        load_model(tmp_path / 'other')


def test_saved_budget_of_a_config_without_newer_keys_has_their_defaults():
    config = {'model.reduce_at': [3, 6, 9], 'model.fuse': True, 'keep.rate': 0.7}
    assert saved_budget(config) == TokenBudget(EVIT, (3, 6, 9), True, (0.7,) * 3)


def test_load_model_of_another_architecture_or_of_no_checkpoint_is_refused(tmp_path):
    (tmp_path / 'weights.pth').write_bytes(b'')
    for name, message in (('none', 'there is no folder .*none'), ('weights.pth', 'is a file: .* evit_jax.convert'),
                          ('', 'holds no checkpoint')):
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / name)
    params = random_params(models.create(models.get_config('vit_digits')))
    for name, message in (('deit_t', 'do not fit this model'), ('vit_mine', "unknown model 'vit_mine'")):
        weights.save(tmp_path / name, params, {'config': {'model': {'name': name}}})
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / name)


def test_load_model_with_an_unknown_field_of_the_config_names_the_field(tmp_path):
    loaded = tiny.model().loaded
    metadata = loaded.metadata()
    metadata['model_config']['fields']['rotary'] = True
    weights.save(tmp_path, loaded.params, metadata)
    with pytest.raises(ValueError, match='unknown field rotary'):
        load_model(tmp_path)


def test_learned_modules_stay_with_their_blocks_after_another_plan():
    trained = tiny.model(reducer='dynamicvit', reduce_at=(0, 1)).loaded
    dense = trained.with_plan(plan=make_plan(16, 2, reduce_at=(), reducer=trained.budget.reducer))
    shifted = make_plan(16, 2, rate=0.5, reduce_at=(1,), reducer=trained.budget.reducer)
    for model in (trained, dense):
        with pytest.raises(ValueError, match='the module trained at block 0 at block 1'):
            model.plan(plan=shifted)


def test_saved_model_with_another_reducer_keeps_its_learned_modules(tmp_path):
    model = tiny.model(reducer='dynamicvit', reduce_at=(0, 1)).with_reducer('evit')
    model.save(tmp_path / 'model')
    again = load_model(tmp_path / 'model')
    assert again.budget.reducer.name == 'evit' and again.modules == model.loaded.modules
    assert again.with_reducer('dynamicvit').plan().counts == (8, 4)


SEARCHED = make_plan(16, 2, tokens=(12, 8), drop=(2, 1), reduce_at=(0, 1), reducer=get_reducer('prune_merge:mean'))


def searched_file(loaded):
    return PlanFile.of(SEARCHED, 'a', 16, reducer='prune_merge:mean', weights=digest_of_weights(loaded.params),
                       architecture=digest_of_architecture(loaded.config))


def test_plan_with_r_for_each_block_merges_these_numbers(loaded):
    assert loaded.with_reducer('tome').plan(r=[5, 0]).counts == (11, 11)
    assert loaded.with_reducer('tome').with_plan(r=(5, 2)).plan().counts == (11, 9)


def test_with_plan_of_a_searched_plan_sets_its_reducer_and_drops(loaded, caplog):
    planned = loaded.with_plan(plan=searched_file(loaded))
    assert planned.plan() == loaded.plan(plan=SEARCHED) == SEARCHED
    assert planned.budget == loaded.with_plan(plan=SEARCHED).budget and not caplog.text
    assert planned.with_reducer('prune_merge:mean').with_plan(plan=searched_file(loaded)).plan() == SEARCHED
    assert planned.with_plan(keep_rate=0.5).plan().drop == ()


def test_with_plan_of_a_searched_plan_after_another_reducer_raises_and_names_both(loaded):
    with pytest.raises(ValueError, match='is for the reducer prune_merge:mean, and tome is given'):
        loaded.with_reducer('tome').with_plan(plan=searched_file(loaded))


def test_with_plan_searched_for_other_weights_warns_once(loaded, caplog):
    other = tiny.model(seed=1).loaded
    assert other.with_plan(plan=searched_file(loaded)).plan() == SEARCHED
    assert caplog.text.count('was searched for other weights of a') == 1


def test_with_plan_searched_for_another_image_size_is_rescaled_with_a_warning(loaded, caplog):
    plan = loaded._replace(image_size=32).plan(plan=searched_file(loaded))
    assert (plan.patches, plan.tokens, plan.dropped) == (64, (48, 32), (8, 4))
    assert 'searched for 16 patches, and an image has 64' in caplog.text


def test_with_plan_searched_for_another_architecture_raises(loaded):
    other = loaded._replace(config=dataclasses.replace(loaded.config, registers=1))
    with pytest.raises(ValueError, match=r'is for a \(architecture .*\) with 16 .*and this is custom \(architecture'):
        other.with_plan(plan=searched_file(loaded))
