"""Gathers and scatters have the results of JAX in ONNX Runtime, also for indices that are out of range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.onnx_programs import assert_same, convert

TABLE = np.arange(15, dtype=np.float32).reshape(5, 3)


def top(x, keep=3):
    """Returns indices [b, keep] along the axis 1 of x [b, 5, 4]."""
    return jax.lax.top_k(x[..., 0], keep)[1]


def wild(x):
    """Returns indices [b, 5], some of which are negative or too large."""
    return (x[..., 0] * 3).astype(jnp.int32)


GATHERS = {
    'rows': lambda x: jnp.take_along_axis(x, top(x)[..., None], axis=1),
    'elements': lambda x: jnp.take_along_axis(x[..., 1], top(x), axis=1),
    'last_axis': lambda x: jnp.take_along_axis(x, jnp.argmax(x, axis=-1)[..., None], axis=2),
    'inner_axis': lambda x: jnp.take_along_axis(x.transpose(0, 2, 1), top(x)[:, None], axis=2),
    'out_of_range': lambda x: jnp.take_along_axis(x[..., 1], wild(x), axis=1),
    'rows_out_of_range': lambda x: jnp.take_along_axis(x, wild(x)[..., None], axis=1),
    'integers_out_of_range': lambda x: jnp.take_along_axis(wild(x), wild(x), axis=1),
    'clipped': lambda x: jnp.take_along_axis(x[..., 1], wild(x), axis=1, mode='clip'),
    'vmapped': lambda x: jax.vmap(lambda row, i: row[i])(x, top(x)), 'first': lambda x: x[:, 0],
    'strided': lambda x: x[:, 1::2], 'of_a_list': lambda x: x[:, jnp.array([3, 0, 3])],
    'single_row': lambda x: x[:, 2:3] * 2, 'twice': lambda x: jnp.take_along_axis(top(x), top(x[:, :3], 2), axis=1)}
SCATTERS = {
    'set': lambda x: jax.vmap(lambda row, i: row.at[i].set(7))(x[..., 1], top(x)),
    'set_range': lambda x: jax.vmap(lambda i: jnp.full(5, -1).at[i].set(jnp.arange(3)))(top(x)),
    'add': lambda x: jax.vmap(lambda row, i: jnp.zeros(5).at[i % 2].add(row))(x[:, :3, 0], top(x)),
    'add_rows': lambda x: jax.vmap(lambda row, i: jnp.zeros((5, 4)).at[i].add(row))(x[:, :3], top(x)),
    'multiply': lambda x: jax.vmap(lambda row, i: row.at[i].mul(2))(x[..., 1], top(x)),
    'out_of_range': lambda x: jax.vmap(lambda row, i: row.at[i].add(1))(x[..., 1], wild(x)),
    'dropped': lambda x: jax.vmap(lambda i: jnp.zeros(4).at[jnp.abs(i)].set(1, mode='drop'))(wild(x)),
    'no_rows': lambda x: jax.vmap(lambda row, i: row.at[i].set(7))(x[..., 1], top(x)[:, :0])}


@pytest.mark.parametrize('name', GATHERS)
def test_gather_equals_jax(name):
    assert_same(GATHERS[name])


@pytest.mark.parametrize('name', SCATTERS)
def test_scatter_equals_jax(name):
    assert_same(SCATTERS[name])


def test_gather_from_a_table_equals_jax():
    assert_same(lambda x, table: table[top(x)], table=TABLE)
    assert_same(lambda x, table: table[:, 1][top(x)], table=TABLE)


def test_gather_with_an_index_in_range_has_no_check_of_the_range():
    counts = assert_same(GATHERS['rows'])
    assert not counts['Where'] and not counts['Less'] and counts['GatherND'] == 1
    assert assert_same(GATHERS['out_of_range'])['Where']


def test_strided_gather_is_a_slice():
    counts = assert_same(GATHERS['strided'])
    assert counts['Slice'] == 1 and not counts['Gather']


def test_gather_of_two_axes_is_refused():
    with pytest.raises(ValueError, match=r'computes gather .several indexed axes.'):
        convert(lambda x: x[:, ::2, ::2])
