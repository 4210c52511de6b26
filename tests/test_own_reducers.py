"""Reducers defined in a notebook work with load, evaluate, train, export and benchmark."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import evit_jax
from evit_jax.benchmarks import model_speed
from evit_jax.benchmarks.workloads import WorkloadLists, combine
from evit_jax.reduction import registry
from evit_jax.reduction.merging import merge_runs
from evit_jax.serving import artifact, loader
from tests.helpers import tiny
from tests.helpers.tiny_run import config_of

STEPS = 20


@pytest.fixture(scope='module', autouse=True)
def own_registry():
    """Restores the registered reducers after the tests of this file."""
    registry.list_reducers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, '_REDUCERS', dict(registry._REDUCERS))
        yield
    jax.clear_caches()  # a later registration of these names is equal to these reducers


def by_norm():
    @evit_jax.register_reducer('l2')
    def l2(tokens, inputs, keep):
        return evit_jax.keep_top(tokens, jnp.linalg.norm(tokens.patches, axis=-1), keep)

    return l2


def by_merging():
    @evit_jax.register_reducer('neighbours', merges=True)
    def neighbours(tokens, inputs, keep):
        return merge_runs(tokens, keep)

    return neighbours


def by_learning():
    @evit_jax.register_reducer('scored', module=lambda width, rngs: nnx.Linear(width, 1, rngs=rngs))
    def scored(tokens, inputs, keep):
        scores = inputs.module(tokens.patches)[..., 0]
        gate = jnp.pad(jax.nn.sigmoid(scores), ((0, 0), (1, 0)), constant_values=1)
        return evit_jax.keep_top(tokens.replace(x=tokens.x * gate[..., None]), scores, keep)

    return scored


@pytest.fixture(scope='module', params=[pytest.param(by_norm, marks=pytest.mark.slow), by_merging, by_learning],
                ids=lambda make: make.__name__)
def reducer(request):
    return request.param()


@pytest.fixture(scope='module')
def stripes():
    return tiny.stripes()


@pytest.fixture(scope='module')
def model(reducer, tmp_path_factory):
    folder = tmp_path_factory.mktemp('weights') / 'model'
    tiny.model(reduce_at=(0,)).save(folder)  # the last block would not change the logits
    return evit_jax.load(folder).with_reducer(reducer)


@pytest.fixture(scope='module')
def run(model, stripes, tmp_path_factory):
    """The workdir of a training of 20 steps with the reducer, and the trained model."""
    workdir = tmp_path_factory.mktemp('run') / 'run'
    config = config_of(
        batch_size=24, epochs=5, ema_decay=0.0, label_smoothing=0.0, optimizer__lr=0.02, data__augment='none',
        data__flip=0.0, data__colour_jitter=0.0, mixing__erase=0.0, mixing__mixup=0.0, mixing__cutmix=0.0,
        model__drop_path=0.0, keep__start_epoch=0, keep__shrink_epochs=0, log__every=1, log__eval_epochs=100.0,
        log__pictures=0, checkpoint__every=1000)
    return workdir, evit_jax.train(config, model=model, train=stripes, test=stripes, workdir=workdir)


def losses(workdir):
    from evit_jax.metrics.writers import read_metrics
    records = read_metrics(workdir / 'metrics.jsonl')
    return [record['train/loss'] for record in records if 'train/loss' in record]


def test_loaded_model_computes_with_the_reducer(model, reducer):
    output = model.forward(tiny.images(4))
    assert model.plan.reducer is reducer and output.logits.shape == (4, 3)
    assert output.kept[0].shape == (4, 8) and output.token_of_patch[0].shape == (4, 16)


def test_evaluation_counts_all_images(model, stripes):
    metrics = evit_jax.evaluate(model, stripes)
    assert metrics['images'] == 96 and 0 <= metrics['top1'] <= 1 and metrics['macs'] < metrics['macs_dense']


def test_training_learns_and_its_model_is_loaded_with_the_reducer(run, reducer, model):
    workdir, trained = run
    values = losses(workdir)
    assert len(values) == STEPS and np.mean(values[-3:]) < 0.7 * np.mean(values[:3])
    assert trained.plan.reducer == reducer
    if reducer.is_learned:
        before, after = (loaded.params['reducer'][0]['kernel'] for loaded in (model, trained))
        assert np.abs(np.asarray(after) - before).max() > 1e-3


def test_learned_parameters_get_a_gradient(model, reducer):
    if not reducer.is_learned:
        pytest.skip('the reducer has no parameters')
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, 16, 3)), jnp.float32)
    gradient = jax.jit(jax.grad(lambda params: (model.apply(params, images).logits ** 2).sum()))(model.params)
    assert np.abs(gradient['reducer'][0]['kernel']).max() > 0


def test_exported_model_gives_the_probabilities_of_the_trained_one(run, tmp_path):
    _, trained = run
    artifact.write(tmp_path, trained.loaded, {'own': trained.plan}, platforms=('cpu',), kept=True)
    images = tiny.images(2)
    want = jax.nn.softmax(trained(images))
    np.testing.assert_allclose(loader.Served(tmp_path)(images, 'own')['probabilities'], want, atol=1e-5)


def test_benchmark_measures_the_reducer(run, reducer):
    workdir, _ = run
    workloads = combine(WorkloadLists(names=[str(workdir)], rates=[1.0, 0.5], batch_sizes=[2], reducers=[reducer.name]))
    rows = model_speed.measure(workloads, rounds=1, seconds=0.1)['rows']
    assert {row['reducer'] for row in rows} >= {reducer.name} and all(row['images_per_second'] > 0 for row in rows)
