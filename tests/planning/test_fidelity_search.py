"""The plan search on images: errors, search, journal, images of search and check.

The searches run with a model in the slow tests, and with a stand-in that compiles nothing in the fast ones.
"""

import dataclasses

import numpy as np
import pytest
from PIL import Image

import evit_jax
from evit_jax.planning import calibration, fidelity_search, image_search
from evit_jax.planning.blockwise import BlockwiseModel, Outputs
from evit_jax.planning.fidelity import Fidelity
from evit_jax.planning.fidelity_search import PlanSearch
from evit_jax.planning.journal import Journal
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.registry import get_reducer
from tests.helpers import tiny
from tests.helpers.benchmarks import time_once

CONFIG = dataclasses.replace(tiny.CONFIG, depth=4)
DENSE = make_plan(16, 4, reduce_at=())
METHODS = tuple(map(get_reducer, ('prune_merge', 'tome')))


def fraction(plan):
    """Returns the MACs of a plan as a fraction of those of the dense model."""
    return CONFIG.macs(plan) / CONFIG.macs(DENSE)


def outputs(logits):
    return Outputs(np.float32(logits), np.float32(logits))


class StandIn:
    """Stands in for `BlockwiseModel`: the tokens that a block removes change the logits of 8 images in proportion."""

    config, patches = CONFIG, DENSE.patches
    _effects = {'prune_merge': 0.5, 'tome': 1.0}  # reducer -> size of the change that each removed token causes

    def __init__(self):
        rng = np.random.default_rng(0)
        self._logits, self._changes = rng.normal(size=(8, 3)), rng.normal(size=(CONFIG.depth, 8, 3), scale=0.1)

    def outputs(self, plan):
        removed = -np.diff((plan.patches, *plan.counts))
        change = self._effects.get(plan.reducer.name, 0) * removed + 0.2 * np.array(plan.drop or (0,) * CONFIG.depth)
        return outputs(self._logits + np.tensordot(change, self._changes, 1))

    def set_base(self, plan):
        pass


@pytest.fixture(scope='module')
def model():
    return evit_jax.create_model(CONFIG, class_names=tiny.NAMES)


@pytest.fixture(scope='module')
def blockwise(model):
    """Keeps its compiled programs for all searches."""
    return BlockwiseModel(model.loaded, tiny.images(8))


@pytest.fixture(params=['stand_in', pytest.param('model', marks=pytest.mark.slow)])
def search(request):
    """Returns a function that creates a search."""
    model = StandIn() if request.param == 'stand_in' else request.getfixturevalue('blockwise')

    def create(journal=None):
        return PlanSearch(model, Fidelity.of(CONFIG, model.outputs(DENSE)), journal=journal)

    return create


def test_errors_of_a_model_with_classes_are_kl_divergences():
    dense, other = [[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]], [[1.0, 1.0, 0.5], [4.0, 0.0, 3.0]]
    fidelity = Fidelity.of(CONFIG, outputs(dense), np.array([1, 2]))
    p, q = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True) for logits in map(np.array, (dense, other)))
    np.testing.assert_allclose(fidelity.errors(outputs(other)), (p * np.log(p / q)).sum(1), rtol=1e-6)
    figures = fidelity.figures(outputs(other))
    assert figures['agreement'] == 0 and figures['top1'] == 0
    assert fidelity.figures(outputs(dense)) == {'error': 0, 'error_90': 0, 'agreement': 1, 'top1': 1}


def test_errors_of_a_model_without_classes_are_cosine_distances():
    fidelity = Fidelity.of(dataclasses.replace(CONFIG, classes=0), outputs([[1, 0], [3, 4]]), np.array([0, 1]))
    errors = fidelity.errors(outputs([[0, 2], [4, 3]]))
    np.testing.assert_allclose(errors, [100, 100 * (1 - 24 / 25)], rtol=1e-6)
    assert set(fidelity.figures(outputs([[0, 2], [4, 3]]))) == {'error', 'error_90'}


def test_search_finds_a_plan_within_the_budget_that_is_no_worse_than_any_method(search):
    found = search().find(fraction, 0.6, METHODS, 600)
    assert found.finished and set(found.methods) == {'prune_merge', 'tome'}
    assert fraction(found.plan) <= 0.6
    assert found.evaluated > 10
    assert found == search().find(fraction, 0.6, METHODS, 600)._replace(seconds=found.seconds)


def test_search_begins_with_the_better_of_two_shapes_for_all_methods(search, monkeypatch):
    plans, fitted = search(), []
    fit = plans._fit
    monkeypatch.setattr(plans, '_fit', lambda *args: fitted.append((args[0].name, args[1])) or fit(*args))
    monkeypatch.setattr(plans, '_improve_shape', lambda reducer, shape: fitted.append(shape))
    monkeypatch.setattr(plans, '_improve_blocks', lambda: None)
    found = plans.find(fraction, 0.6, METHODS, 600)
    errors = [plans._error(fit(METHODS[0], shape).plan) for shape in fidelity_search._FIRST_SHAPES]
    assert found.methods['prune_merge'] == min(errors) and found.error <= min(errors)
    assert fitted[-2:] == [('tome', fitted[-1]), fitted[-1]]


def test_search_for_a_smaller_budget_has_a_larger_error(search):
    plans = search()
    errors = [plans.find(fraction, budget, METHODS, 600).error for budget in (0.9, 0.7, 0.5)]
    assert errors == sorted(errors)


def test_search_without_time_returns_the_best_plan_so_far(search, monkeypatch):
    ticks = iter(range(10_000))
    monkeypatch.setattr(fidelity_search.time, 'monotonic', lambda: next(ticks))
    found = search().find(fraction, 0.6, METHODS, 10)
    assert not found.finished and found.evaluated >= 1


def test_search_that_cannot_reach_the_budget_raises_and_names_the_least_cost(search):
    with pytest.raises(ValueError, match=r'no plan costs at most 0.01; the cheapest plans cost 0\.\d+ by prune_merge, '
                                         r'0\.\d+ by tome: give a less ambitious target'):
        search().find(fraction, 0.01, METHODS, 600)


def test_search_continues_from_a_journal_without_evaluating_again(search, tmp_path, monkeypatch):
    first = search(Journal(tmp_path / 'journal', 'a')).find(fraction, 0.6, METHODS, 600)
    again = search(Journal(tmp_path / 'journal', 'a'))
    monkeypatch.setattr(again._model, 'outputs', lambda plan: pytest.fail('evaluated again'))
    monkeypatch.setattr(again._model, 'set_base', lambda plan: None)
    assert again.find(fraction, 0.6, METHODS, 600).plan == first.plan
    assert Journal(tmp_path / 'journal', 'b').get(str(first.plan)) is None  # the journal of another search


@pytest.fixture
def folder(tmp_path):
    """Images in folders of classes, one of them damaged."""
    for index, pixels in enumerate(tiny.images(9)):
        path = tmp_path / 'images' / tiny.NAMES[index % 3] / f'{index}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (tmp_path / 'images' / 'red' / 'bad.png').write_bytes(b'no image')
    return tmp_path / 'images'


def test_read_leaves_out_unreadable_images_and_finds_the_labels(folder, model):
    read = calibration.read(sorted(folder.rglob('*.png')), model.loaded, 100)
    assert len(read.names) == 9 and read.images.shape == (9, 16, 16, 3)
    assert [tiny.NAMES[label] for label in read.labels] == [name.split('/')[-2] for name in read.names]
    with pytest.raises(ValueError, match=r'none of the 1 images can be read; the first: .*bad.png'):
        calibration.read([folder / 'red' / 'bad.png'], model.loaded, 100)


def test_files_without_a_check_divide_the_images(folder, model):
    files = sorted(map(str, folder.rglob('*.png')))
    search, check = image_search.Files(files, (), num_search=4, num_check=100).read(model.loaded)
    assert len(search.names) == 4 and len(check.names) == 5 and not {*search.names} & {*check.names}
    search, check = image_search.Files(files, (), num_search=64).read(model.loaded)
    assert len(search.names) == 6 and len(check.names) == 3
    with pytest.raises(ValueError, match='one image is not enough'):
        image_search.Files(files[:1], ()).read(model.loaded)


def test_files_with_a_check_leave_its_images_out_of_the_search(folder, model):
    files = [*map(str, sorted(folder.rglob('[0-9].png')))]
    search, check = image_search.Files(files, files[:2]).read(model.loaded)
    assert sorted(check.names) == files[:2] and sorted(search.names) == sorted(files[2:])
    with pytest.raises(ValueError, match='all images of the search are images of the check'):
        image_search.Files(files[:2], files[:2]).read(model.loaded)


def test_speed_up_returns_a_model_with_a_searched_plan(model, monkeypatch):
    time_once(monkeypatch)
    fast = evit_jax.speed_up(model, list(tiny.images(6)), target='0.7MACs', minutes=0.05, reducers=('ward',))
    assert fast.plan.reducer.name == 'ward' and fast.macs <= 0.7 * CONFIG.macs(DENSE)
    assert fast(tiny.images(2)).shape == (2, 3)
