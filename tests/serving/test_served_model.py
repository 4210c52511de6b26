"""The plans of the server: their names, defaults, and those that do not fit the model."""

import pytest

from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.serving.served_model import ServedModel, plans_of
from tests.helpers import tiny

PLAN_FILE = PlanFile(model='custom', image_size=16, patches=16, depth=2, reduce_at=(0, 1), tokens=(9, 4), fuse=True,
                     path='fast.json')


def test_plans_of_defaults_are_rates_of_the_reducers_and_the_plan_of_training():
    loaded = tiny.model(keep_rate=0.6).loaded
    assert [*plans_of(loaded)] == ['0.3', '0.5', '0.6', '0.7', '1.0']
    assert [*plans_of(loaded, reducers=['tome'])][5:] == ['tome-0.5', 'tome-0.6', 'tome-0.7']  # ToMe keeps half
    assert [*plans_of(tiny.model(reduce_at=()).loaded)] == ['trained']


def test_plans_of_rates_add_the_dense_plan_and_that_of_training():
    plans = plans_of(tiny.model(keep_rate=0.6).loaded, rates=(0.5,), files={'fast': PLAN_FILE})
    assert [*plans] == ['0.5', 'fast', 'trained', 'dense'] and [*plans_of(
        tiny.model().loaded, rates=(0.3, 0.6), reducers=['tome'])][:3] == ['0.3', '0.6', 'tome-0.6']
    assert plans['fast'].tokens == (9, 4) and plans['dense'] == make_plan(16, 2, reduce_at=())


@pytest.mark.parametrize('arguments, message', [
    ({'rates': (1.5,)}, '1.5'), ({'reducers': ['tomme']}, 'tomme.*tome'), ({'reducers': ['dynamicvit']}, 'dynamicvit'),
    ({'files': {'fast': PLAN_FILE._replace(model='deit_s', patches=196, depth=12)}}, 'deit_s'),
    ({'rates': (0.5,), 'files': {'0.5': PLAN_FILE}}, '--plan=fast.json gives the name 0.5, which another plan has')])
def test_plans_of_values_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        plans_of(tiny.model().loaded, **arguments)


def test_find_plan_without_a_dense_plan_finds_only_rates():
    loaded = tiny.model().loaded
    served = ServedModel.of_loaded(loaded, {'0.5': loaded.plan(keep_rate=0.5)}, 'jax')
    assert served.dense is None and served.find_plan(rate=0.5) == served.find_plan() == '0.5'
    with pytest.raises(ValueError, match='there is no plan of rate 1 and reducer evit'):
        served.find_plan(rate=1.0)
