"""Rotary position embeddings against complex multiplication."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.kernels.rope import grid_coordinates, rotate


def test_grid_coordinates_of_eva_are_indices_scaled_to_the_reference_grid():
    np.testing.assert_array_equal(grid_coordinates('eva', 2, 3), [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]])
    np.testing.assert_allclose(grid_coordinates('eva', 4, 2, reference=8)[-1], [6, 4])


def test_grid_coordinates_of_dinov3_are_patch_centres_between_minus_and_plus_two_pi():
    coordinates = grid_coordinates('dinov3', 2, 4) / (2 * math.pi)
    np.testing.assert_allclose(coordinates[0], [-0.5, -0.75], rtol=1e-6)
    np.testing.assert_allclose(coordinates[-1], [0.5, 0.75], rtol=1e-6)


@pytest.mark.parametrize('interleaved', [True, False])
def test_rotate_equals_the_product_with_complex_numbers(interleaved):
    rng = np.random.default_rng(0)
    x, coordinates = rng.normal(size=(2, 3, 2, 8)), rng.normal(size=(2, 3, 2)) * 4
    rotated = rotate(jnp.asarray(x, jnp.float32), jnp.asarray(coordinates, jnp.float32), base=100.0,
                     interleaved=interleaved)
    pairs = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :4], x[..., 4:])
    angles = np.concatenate([coordinates[..., :1] / [1, 10], coordinates[..., 1:] / [1, 10]], -1)[:, :, None]
    product = (pairs[0] + 1j * pairs[1]) * np.exp(1j * angles)
    expected = np.stack([product.real, product.imag], -1)
    expected = expected.reshape(x.shape) if interleaved else np.moveaxis(expected, -1, -2).reshape(x.shape)
    np.testing.assert_allclose(rotated, expected, atol=1e-5)


def test_rotate_by_zero_returns_its_input():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 1, 4)), jnp.float32)
    np.testing.assert_array_equal(rotate(x, jnp.zeros((1, 2, 2)), base=100.0, interleaved=True), x)
