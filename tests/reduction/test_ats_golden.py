"""Parity of ATS with JoakimHaurum/TokenReduction and the authors' code, by arrays in tests/golden/token_reduction.

Our sampling departs from both; see `ATS`. The tests compare its parts, and derive our samples from the recorded ones.
"""

import functools
import types

import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.kernels.attention import multi_head_attention
from evit_jax.reduction.inputs import ModelInputs, ReducerInputs
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.registry import get_reducer
from evit_jax.reduction.tokens import Tokens
from tests.helpers import golden

ATS = get_reducer('ats')
KEEPS = (12, 5)  # sample counts of the two recorded reductions; the second has masked tokens
each_reduction = pytest.mark.parametrize('stage', [0, 1])


def read(name):
    return np.load(golden.FOLDER / 'token_reduction' / f'{name}.npz')


def make_tokens(x, mask=None):
    ids = jnp.broadcast_to(jnp.arange(x.shape[1] - 1, dtype=jnp.int32), (x.shape[0], x.shape[1] - 1))
    return Tokens(jnp.asarray(x), ids, ids, mask=mask)


@functools.cache
def reduce(stage):
    """Returns our reduction of the recorded tokens, after an attention layer with the recorded parameters."""
    recorded = read(f'ats_{stage}')
    mask = jnp.asarray(recorded['mask'], jnp.float32) if stage else None
    qkv = jnp.asarray(recorded['x'] @ recorded['param/qkv.weight'].T + recorded['param/qkv.bias'])
    heads = golden.manifest('token_reduction/cases.json')['heads']
    attention = multi_head_attention(qkv, heads, mask=mask)
    attention = attention.replace(out=attention.out @ recorded['param/proj.weight'].T + recorded['param/proj.bias'])
    tokens = make_tokens(recorded['x'], None if mask is None else mask[:, 1:])
    plan = make_plan(tokens.patch_ids.shape[1], 1, tokens=(KEEPS[stage],), reduce_at=(0,), reducer=ATS)
    inputs = ReducerInputs(tokens, attention, plan, 0, None, ModelInputs())
    return ATS.reduce(tokens.add(attention.out), inputs, KEEPS[stage])


def images(stage):
    """Yields the recorded arrays of each image, and the ids, scores and activations of the tokens that we sample."""
    recorded, output = read(f'ats_{stage}'), reduce(stage)
    for image, mask in enumerate(recorded['mask']):
        used = np.asarray(output.mask[image]) > 0
        arrays = types.SimpleNamespace(
            cdf=recorded['cdf'][image, :mask.sum() - 1, 0], steps=recorded['steps'][0, :, 0],
            **{key: recorded[key][image] for key in ('x', 'ids', 'new_mask', 'output', 'nearest')})
        yield arrays, *(np.asarray(array[image])[used] for array in (output.patch_ids, output.scores, output.patches))


def test_ats_records_contain_masked_tokens():
    assert not read('ats_1')['mask'].all() and read('ats_0')['mask'].all()


@each_reduction
def test_ats_has_the_significance_of_the_reference(stage):
    for recorded, ids, scores, _ in images(stage):
        significance = scores - 1  # up to the factor that makes the sum over all tokens 1
        shares = np.diff(recorded.cdf, prepend=0)[ids]
        np.testing.assert_allclose(significance / significance.sum(), shares / shares.sum(), rtol=0, atol=1e-5)


def test_ats_of_one_head_has_the_significance_of_the_authors_code():
    recorded = read('ats_scores')
    attention, values = recorded['class_attention'][..., 1:], recorded['values'][:, :, 1:]
    inputs = types.SimpleNamespace(class_attention_per_head=jnp.asarray(attention), values=jnp.asarray(values),
                                   has_class_token=True)
    output = ATS.reduce(make_tokens(np.zeros((3, 17, 1), np.float32)), inputs, 16)
    for image, scores in enumerate(recorded['scores']):
        used = np.asarray(output.mask[image]) > 0
        significance = np.asarray(output.scores[image])[used] - 1
        shares = scores[np.asarray(output.patch_ids[image])[used]]
        np.testing.assert_allclose(significance / significance.sum(), shares / shares.sum(), rtol=0, atol=1e-5)


@each_reduction
def test_ats_samples_the_token_of_the_reference_or_the_next_one(stage):
    last = 1 - 0.5 / KEEPS[stage]  # the reference leaves out this step if the count of its steps is rounded down
    for recorded, ids, _, _ in images(stage):
        assert set(recorded.nearest + 1) == set(recorded.ids[recorded.new_mask][1:])
        np.testing.assert_allclose(recorded.steps, (np.arange(len(recorded.steps)) + 0.5) / KEEPS[stage], rtol=1e-6)
        first = recorded.nearest + (recorded.cdf[recorded.nearest] < recorded.steps)
        assert set(ids.tolist()) == {*first.tolist(), int(np.argmax(recorded.cdf >= last))}
    assert len(recorded.steps) == (12, 4)[stage]


@each_reduction
def test_ats_has_the_activations_of_the_reference_for_tokens_that_both_sample(stage):
    for image, (recorded, ids, _, patches) in enumerate(images(stage)):
        expected = recorded.x[recorded.ids] + recorded.output  # the class token and the sampled tokens, [K, D]
        np.testing.assert_allclose(reduce(stage).prefix[image, 0], expected[0], rtol=0, atol=1e-5)
        common, ours, theirs = np.intersect1d(1 + ids, recorded.ids[recorded.new_mask], return_indices=True)
        assert len(common) >= 2
        np.testing.assert_allclose(patches[ours], expected[theirs], rtol=0, atol=1e-5)
