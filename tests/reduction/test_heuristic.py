"""The radial heuristic against a loop over the patches, in a model too."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models import create
from evit_jax.models.config import ViTConfig
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.reducers import HEURISTIC
from evit_jax.reduction.tokens import Tokens


def nearest_in_a_loop(patch_ids, grid, keep):
    """Returns the ids of the `keep` tokens nearest to the image centre, nearest first; a fused token is last."""
    def distance(patch):
        row, column = divmod(patch, grid[1])
        return math.hypot(row - (grid[0] - 1) / 2, column - (grid[1] - 1) / 2) if patch >= 0 else math.inf

    return sorted(patch_ids, key=distance)[:keep]


def reduce_tokens(patch_ids, grid, keep, fuse=False):
    tokens = Tokens(jnp.zeros((*patch_ids.shape, 4)), jnp.asarray(patch_ids), stage=1)
    weights = jnp.full(patch_ids.shape, 0.1) if fuse else None
    return HEURISTIC.reduce(tokens, types.SimpleNamespace(grid=grid, fuse_weights=weights), keep)


@pytest.mark.parametrize('grid', [(4, 4), (5, 3), (1, 7)], ids=str)
def test_heuristic_keeps_the_patches_of_a_loop_in_each_image(grid):
    rng, patches = np.random.default_rng(0), math.prod(grid)
    patch_ids = np.stack([rng.permutation(patches)[:patches - 1] for _ in range(3)]).astype(np.int32)
    for keep in range(1, patches):
        kept = reduce_tokens(patch_ids, grid, keep).patch_ids
        assert kept.tolist() == [nearest_in_a_loop(ids, grid, keep) for ids in patch_ids.tolist()]


@pytest.mark.parametrize('keep', [1, 4, 6])
def test_heuristic_with_a_fused_token_keeps_the_patches_first(keep):
    patch_ids = np.asarray([[-1, 5, 10, 0, 15, 3, 9], [0, 3, 12, -1, 15, 1, 2]], np.int32)
    output = reduce_tokens(patch_ids, (4, 4), keep, fuse=True)
    expected = [[*nearest_in_a_loop(ids, (4, 4), keep), -2] for ids in patch_ids.tolist()]
    assert output.patch_ids.tolist() == expected and np.isfinite(output.scores).all()


def test_heuristic_in_a_model_keeps_the_centre_of_a_rectangle_at_each_reduction():
    config = ViTConfig(image_size=(16, 24), patch_size=4, width=16, depth=3, heads=2, classes=5)
    model = create(config)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 24, 3)), jnp.float32)
    plan = make_plan(24, 3, tokens=(12, 5), reduce_at=(0, 2), reducer=HEURISTIC)
    _, intermediates = jax.jit(model.apply, static_argnums=2)(model.init(jax.random.key(0)), images, plan)
    first = nearest_in_a_loop(range(24), (4, 6), 12)
    second = nearest_in_a_loop([*first, -1], (4, 6), 5)
    assert [kept.tolist() for kept in intermediates['kept']] == [[[*first, -1]] * 2, [[*second, -2]] * 2]


def test_heuristic_without_a_grid_raises():
    with pytest.raises(ValueError, match='reducer heuristic needs the grid of the patches'):
        reduce_tokens(np.zeros((1, 3), np.int32), None, 2)
