"""Products, convolutions, reductions and sorts have the results of JAX in ONNX Runtime."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.onnx_programs import assert_same, convert

W = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
PRODUCTS = ('bid,bjd->bij', 'bid,bjd->bji', 'bid,bid->bi', 'bid,bjd->b', 'bid,bie->bde', 'bid,bjd->bijd')
REDUCTIONS = {
    'sum': lambda x: x.sum(1), 'max': lambda x: x.max((1, 2)), 'min': lambda x: x.min(-1), 'prod': lambda x: x.prod(1),
    'mean': lambda x: x.mean((1, 2)), 'any': lambda x: (x > 5).any(1), 'all': lambda x: (x < 3).all((1, 2)),
    'argmax': lambda x: x.argmax(1), 'argmin': lambda x: x.argmin(-1), 'cumsum': lambda x: jnp.cumsum(x, axis=1),
    'reverse_cumsum': lambda x: jax.lax.cumsum(x, axis=2, reverse=True), 'count': lambda x: (x > 0).sum(1),
    'norm': lambda x: jnp.linalg.norm(x, axis=-1), 'logsumexp': lambda x: jax.nn.logsumexp(x, axis=1)}
SORTS = {
    'sort': lambda x: jnp.sort(x, axis=1), 'argsort': lambda x: jnp.argsort(x, axis=1),
    'descending': lambda x: jnp.argsort(x, axis=2, descending=True), 'top_k': lambda x: tuple(jax.lax.top_k(x, 3)),
    'of_integers': lambda x: jnp.sort(jnp.argsort(x, axis=1)[:, :3], axis=1),
    'with_values': lambda x: jax.lax.sort((x, x * 2), dimension=1, num_keys=1)[1]}


@pytest.mark.parametrize('equation', PRODUCTS)
def test_product_of_batches_equals_jax(equation):
    assert_same(lambda x: jnp.einsum(equation, x, x + 1))


@pytest.mark.parametrize('equation', ('bqk,bq->bk', 'bqk,bk->bq', 'bq,bqk->bk'))
def test_product_of_a_matrix_and_a_vector_transposes_no_matrix(equation):
    def product(x):
        parts = {'bqk': x, 'bq': x[:, :, 1], 'bk': x[:, 1]}
        return jnp.einsum(equation, *(parts[part] for part in equation[:-4].split(',')))

    assert not assert_same(product)['Transpose']


def test_product_with_weights_is_one_matmul():
    counts = assert_same(lambda x, w: x @ w + 1, w=W)
    assert counts['MatMul'] == 1 and not counts['Reshape'] and not counts['Transpose']
    assert_same(lambda x, w: jnp.einsum('bid,de->be', x, w), w=W)
    assert_same(lambda x, w: jnp.einsum('de,bid->ebi', w, x), w=W)
    assert_same(lambda x, w: x[:, 0] @ w, w=W)
    assert_same(lambda x, w: w.T @ x[:, 0, :, None], w=W)


def test_convolution_equals_jax():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 2, 6)).astype(np.float32)

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2, 1), ((1, 1), (0, 2)),
                                            dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

    assert_same(convolve, (9, 8, 2), kernel=kernel)


@pytest.mark.parametrize('name', REDUCTIONS)
def test_reduction_equals_jax(name):
    assert_same(REDUCTIONS[name])


@pytest.mark.parametrize('name', SORTS)
def test_sort_equals_jax(name):
    assert_same(SORTS[name])


def test_sort_of_equal_keys_keeps_their_order():
    assert_same(lambda x: jnp.argsort(jnp.sign(x), axis=1))
    assert_same(lambda x: jnp.argsort(jnp.sign(x), axis=1, descending=True))
    assert_same(lambda x: jax.lax.top_k(jnp.sign(x), 4)[1])


def test_argsort_gathers_nothing():
    assert not assert_same(lambda x: jnp.argsort(x, axis=1))['GatherElements']


def test_sort_by_two_keys_is_refused():
    with pytest.raises(ValueError, match=r'computes sort .a sort by several keys.'):
        convert(lambda x: jax.lax.sort((jnp.sign(x), x), dimension=1, num_keys=2)[1])
