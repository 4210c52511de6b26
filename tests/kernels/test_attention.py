"""Attention against a softmax in numpy, and its two implementations against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.kernels import attention


def test_attention_output_has_the_rows_of_the_softmax_and_the_keys_and_values_of_the_heads():
    qkv = np.random.default_rng(0).normal(size=(3, 6, 24)).astype(np.float32)
    q, k, v = qkv.reshape(3, 6, 3, 2, 4).transpose(2, 0, 3, 1, 4)
    weights = np.exp(np.einsum('bhqd,bhkd->bhqk', q / 2, k))
    weights /= weights.sum(axis=-1, keepdims=True)
    output = attention.multi_head_attention(jnp.asarray(qkv), 2)
    np.testing.assert_allclose(output.class_attention, weights.mean(axis=1)[:, 0], rtol=1e-5)
    np.testing.assert_allclose(output.class_attention_per_head(), weights[:, :, 0], rtol=1e-5)
    np.testing.assert_allclose(output.received_attention(), weights.mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(output.mean_keys(), k.mean(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(output.keys(), k)
    np.testing.assert_array_equal(output.values(), v)


def test_attention_rows_of_a_mask_equal_those_of_the_unmasked_tokens_alone():
    qkv = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 24)), jnp.float32)
    size = jnp.asarray(np.random.default_rng(1).integers(1, 4, (2, 7)), jnp.float32)
    kept = np.asarray([0, 2, 3, 6])
    mask = jnp.zeros((2, 7)).at[:, kept].set(1.0)
    masked = attention.multi_head_attention(qkv, 2, size=size, mask=mask)
    alone = attention.multi_head_attention(qkv[:, kept], 2, size=size[:, kept])
    for name in ('class_attention_per_head', 'received_attention'):
        ours, expected = getattr(masked, name)(), getattr(alone, name)()
        np.testing.assert_allclose(ours[..., kept], expected, rtol=1e-5)
        np.testing.assert_allclose(ours.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(masked.class_attention[:, kept], alone.class_attention, rtol=1e-5)


def test_received_attention_is_zero_if_all_tokens_are_masked():
    qkv = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 24)), jnp.float32)
    output = attention.multi_head_attention(qkv, 2, mask=jnp.zeros((2, 7)))
    np.testing.assert_array_equal(output.received_attention(), np.zeros((2, 7)))


@pytest.mark.parametrize('num_queries', [None, 1])
@pytest.mark.parametrize('tracked', [(), ('size',), ('mask',)], ids=['plain', 'size', 'mask'])
def test_attention_head_by_head_equals_attention_of_all_heads_at_once(num_queries, tracked):
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.normal(size=(2, 7, 36)), jnp.float32)
    per_token = {'size': rng.integers(1, 4, (2, 7)), 'mask': rng.integers(0, 2, (2, 7))}
    size, mask = (jnp.asarray(per_token[name], jnp.float32) if name in tracked else None for name in per_token)
    head_by_head, at_once = (attend(qkv, size, mask, num_heads=3, num_queries=num_queries)
                             for attend in (attention._head_by_head, attention._heads_at_once))
    assert at_once[0].shape == (2, num_queries or 7, 12)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), head_by_head, at_once)


@pytest.mark.parametrize('sizes', [False, True])
def test_attention_of_a_long_sequence_in_parts_equals_attention_at_once(monkeypatch, sizes):
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.normal(size=(2, 11, 24)), jnp.float32)
    size = jnp.asarray(rng.integers(1, 4, (2, 11)), jnp.float32) if sizes else None
    at_once = attention.multi_head_attention(qkv, 2, size=size)
    received = at_once.received_attention()
    monkeypatch.setattr(attention, '_LONG', 8)
    monkeypatch.setattr(attention, '_MAX_WEIGHTS', 2 * 2 * 11 * 4)
    assert len(attention._query_parts(2, 2, 11, 11)) == 3
    in_parts = attention.multi_head_attention(qkv, 2, size=size)
    np.testing.assert_allclose(in_parts.out, at_once.out, atol=1e-6)
    np.testing.assert_allclose(in_parts.received_attention(), received, atol=1e-6)
    np.testing.assert_allclose(received.sum(axis=1), 1, rtol=1e-5)
