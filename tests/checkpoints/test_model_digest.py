"""Digests of architecture and weights."""

import dataclasses

import jax
import pytest

from evit_jax.checkpoints.model_digest import digest_of_architecture, digest_of_weights
from evit_jax.models import get_config
from tests.helpers import tiny


@pytest.fixture(scope='module')
def params():
    return tiny.model().params


@pytest.mark.parametrize('changes, is_equal', [
    ({'image_size': 32}, True), ({'classes': 0}, True), ({'projection': True, 'head_bias': False}, True),
    ({'depth': 3}, False), ({'registers': 1}, False), ({'pooling': 'avg'}, False)])
def test_digest_of_architecture_depends_on_the_encoder_alone(changes, is_equal):
    other = dataclasses.replace(tiny.CONFIG, **changes)
    assert (digest_of_architecture(other) == digest_of_architecture(tiny.CONFIG)) == is_equal


def test_digest_of_architecture_is_stable():
    assert digest_of_architecture(get_config('deit_s')) == digest_of_architecture(get_config('deit_s'))
    assert len({digest_of_architecture(get_config(name)) for name in ('deit_s', 'deit_t', 'lvvit_s')}) == 3
    assert len(digest_of_architecture(get_config('lvvit_s'))) == 16


@pytest.mark.parametrize('part, is_equal', [('head', True), ('pos_embed', True), ('patch_embed', False),
                                            ('blocks', False)])
def test_digest_of_weights_depends_on_embedding_and_blocks(params, part, is_equal):
    changed = params | {part: jax.tree.map(lambda leaf: leaf + 1, params[part])}
    assert (digest_of_weights(changed) == digest_of_weights(params)) == is_equal
    assert digest_of_weights(jax.device_put(params)) == digest_of_weights(params)
