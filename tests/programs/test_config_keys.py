"""The table of config keys in configs/base.py: complete, and in agreement with the code that reads the values."""

import re

import pytest

from evit_jax import config_errors
from evit_jax.checkpoints import best
from evit_jax.checkpoints.workdir import flat
from evit_jax.configs import base
from evit_jax.data import sources
from evit_jax.data.transforms import geometry
from evit_jax.metrics import writers
from evit_jax.models import list_models
from evit_jax.models.config import POOLINGS
from evit_jax.models.layers import ACTIVATIONS
from evit_jax.reduction.gather import GATHERS
from evit_jax.runtime import machine, sharding
from evit_jax.training import distillation, limits, step
from tests.helpers import layouts

KEYS = base.KEYS
CHOICES = {
    'data.interpolation': ('', *geometry.FILTERS),
    'sharding': sharding.SHARDINGS, 'nonfinite': step.NONFINITE, 'model.activation': ('', *ACTIVATIONS),
    'model.pooling': ('', *POOLINGS), 'model.freeze': step.FREEZE, 'model.dtype': (machine.AUTO, *machine.DTYPES),
    'model.gather_impl': ('', *GATHERS), 'distill.kind': distillation.KINDS, 'log.writer': writers.KINDS,
    'checkpoint.best': ('', *best.METRICS)}


def changed(name, value):
    config = base.get_config()
    config.update_from_flattened_dict({name: value})
    return flat(config)


def test_get_config_has_exactly_the_keys_and_defaults_of_the_table():
    assert flat(base.get_config()) == flat({name: key.default for name, key in KEYS.items()})
    assert base.get_config().is_locked


@pytest.mark.parametrize('name', KEYS)
def test_key_has_one_line_of_help_and_limits_if_it_is_a_number(name):
    key = KEYS[name]
    assert key.help and '\n' not in key.help and not key.help.endswith('.')
    numeric = isinstance(key.default, int | float | tuple) and not isinstance(key.default, bool)
    assert bool(key.limits) == numeric


@pytest.mark.parametrize('name', [name for name in KEYS if KEYS[name].limits])
def test_check_value_at_a_limit_passes_and_beyond_raises(name):
    key = KEYS[name]
    low, high = map(float, key.limits[1:-1].split(','))

    def of(value):
        return (value,) * max(key.lengths or (1,)) if isinstance(key.default, tuple) else value

    for limit, bracket, beyond in ((low, key.limits[0], low - 1), (high, key.limits[-1], high + 1)):
        if abs(limit) == float('inf'):
            continue
        kind = int if isinstance(key.default, int) else float
        if bracket in '[]':
            limits.check(changed(name, of(kind(limit))))
        else:
            with pytest.raises(ValueError, match=rf'config\.{name}=.* is outside'):
                limits.check(changed(name, of(kind(limit))))
        with pytest.raises(ValueError, match=rf'config\.{name}=.* is outside'):
            limits.check(changed(name, of(kind(beyond)) if beyond != key.special else of(kind(beyond - 1))))


def test_check_special_value_outside_the_limits_passes():
    limits.check(changed('model.classes', 0))


def test_choices_are_those_that_the_code_knows():
    assert {name: key.choices for name, key in KEYS.items() if key.choices} == {
        name: tuple(choices) for name, choices in CHOICES.items()}


@pytest.mark.parametrize(('name', 'known'), [
    ('model.name', list_models()), ('data.source', sources.registry._OPENERS),
    ('reducer.name', [name for file in (layouts.ROOT / 'evit_jax' / 'reduction' / 'reducers').glob('*.py')
                      for name in re.findall(r"register_reducer\('(\w+)'", file.read_text())])])
def test_help_of_a_registry_lists_every_entry_of_the_package(name, known):
    assert known and {*known} <= {*re.findall(r'\w+', KEYS[name].help)}


@pytest.mark.parametrize('name', CHOICES)
def test_check_unknown_choice_raises_with_the_choices(name):
    with pytest.raises(ValueError, match=rf"config\.{name}='xyzzy' is unknown: there are "):
        limits.check(changed(name, 'xyzzy'))


def test_absent_returns_defaults_but_for_weights_without_a_config():
    differ = {name: value for name, value in base.absent().items() if value != KEYS[name].default}
    assert differ == {'keep.rate': 1.0, 'data.mean': (0.485, 0.456, 0.406), 'data.std': (0.229, 0.224, 0.225),
                      'data.interpolation': 'bicubic'}
    assert base.absent('seed', 'keep.rate') == {'seed': 0, 'keep.rate': 1.0}


def test_help_keys_lists_default_allowed_values_and_help_of_every_key():
    entries = list(config_errors.help_keys())
    assert len(entries) == len(KEYS)
    assert entries[0].startswith('--config.seed=0  in [-inf, inf]\n    seed of ')
    assert "--config.model.classes=1000  in 0 or [2, inf]\n" in ''.join(f'{entry}\n' for entry in entries)
    assert any(entry.startswith("--config.model.pooling=''  in '', token, avg, avg_fc_norm") for entry in entries)
