"""Pictures of the patches of one image: hidden, merged, and coloured by values."""

import numpy as np
import pytest

from evit_jax.viz.patches import EDGE, FADED, HEAT_COLOURS, LINE, draw_tokens, enlarge, heat_map, patch_groups
from tests.helpers.pictures import PATCH, make_image, patch_of


def test_patch_groups_without_token_of_patch_show_the_kept_ids():
    np.testing.assert_array_equal(patch_groups([3, 0, -1], None, 5), [1, -1, -1, 0, -1])


def test_patch_groups_hide_patches_of_fused_tokens_and_of_none():
    token_of_patch = [0, 1, 2, -1, 1]  # token 2 is fused, patch 3 is dropped, patches 1 and 4 are merged
    np.testing.assert_array_equal(patch_groups([0, 1, -1], token_of_patch, 5), [0, 1, -1, -1, 1])


def test_patch_groups_of_another_image_raise():
    with pytest.raises(ValueError, match='token_of_patch has 5 patches, the image has 6'):
        patch_groups([0], np.zeros(5, int), 6)
    with pytest.raises(ValueError, match='token_of_patch names token 4 of 2'):
        patch_groups([0, 1], [0, 1, 4], 3)


def test_draw_tokens_leaves_kept_patches_unchanged_and_lightens_dropped_ones():
    image, ids = make_image(), [0, 6, 15]
    picture = draw_tokens(image, np.array(ids), PATCH)
    assert picture.dtype == np.uint8
    for number in range(16):
        if number in ids:
            np.testing.assert_array_equal(patch_of(picture, number), patch_of(image, number))
        else:
            assert (patch_of(picture, number) > patch_of(image, number)).all()


def test_draw_tokens_of_fused_or_dropped_patches_equals_that_of_kept_ids():
    image, ids = make_image(), np.array([9, -1, 2])
    token_of_patch = np.full(16, 1)
    token_of_patch[[9, 2, 5]] = 0, 2, -1
    np.testing.assert_array_equal(draw_tokens(image, ids, PATCH, token_of_patch=token_of_patch),
                                  draw_tokens(image, ids, PATCH))


def test_draw_tokens_dim_is_the_contrast_of_hidden_patches():
    image = make_image()

    def contrast(dim):
        return np.ptp(draw_tokens(image, np.array([], int), PATCH, dim=dim)[..., 0].astype(int))

    assert contrast(0) == 0
    assert contrast(0.5) == pytest.approx(contrast(1) / 2, abs=1)
    np.testing.assert_array_equal(draw_tokens(image, [], PATCH, dim=0), np.broadcast_to(FADED, image.shape))


def test_draw_tokens_ignores_fused_tokens_and_the_order_of_ids():
    image = make_image()
    np.testing.assert_array_equal(
        draw_tokens(image, np.array([9, -1, 2, -3]), PATCH), draw_tokens(image, np.array([2, 9]), PATCH))


def test_draw_tokens_draws_an_edge_on_the_hidden_side():
    image = make_image()
    picture = draw_tokens(image, [5], PATCH, scale=2)
    np.testing.assert_array_equal(picture[8:16, 8:16], enlarge(image, 2)[8:16, 8:16])
    for line in (picture[7, 8:16], picture[16, 8:16], picture[8:16, 7], picture[8:16, 16]):
        assert (line == EDGE).all()


def test_draw_tokens_of_an_image_that_is_not_square_uses_its_grid():
    image = make_image()[:8]  # 2 rows of 4 patches
    np.testing.assert_array_equal(patch_of(draw_tokens(image, [4], PATCH), 4), image[4:8, :4])
    with pytest.raises(ValueError, match='patch 8 is outside the grid of 8 patches'):
        draw_tokens(image, [8], PATCH)


@pytest.mark.parametrize('image, patch, ids, message', [
    (make_image(), PATCH, [3, 16], r'patch 16 is outside the grid of 16 patches, 0 to 15'),
    (make_image(), 5, [0], r'16x16 pixels is not a whole number of patches of 5'),
    (make_image() / 255, PATCH, [0], r'float64 \[16, 16, 3\]: give uint8'),
    (make_image()[..., 0], PATCH, [0], r'uint8 \[16, 16\]: give uint8 \[H, W, 3\]'),
])
def test_draw_tokens_of_bad_input_raises(image, patch, ids, message):
    with pytest.raises(ValueError, match=message):
        draw_tokens(image, np.array(ids), patch)


def test_draw_tokens_fills_merged_patches_with_their_mean_and_leaves_others_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)  # 2 x 3 patches of 2 x 2 pixels
    token_of_patch = np.array([0, 0, 1, 2, 3, 0])
    picture = draw_tokens(image, np.array([0, 2, 3, 4]), 2, token_of_patch=token_of_patch, scale=5)
    assert picture.shape == (20, 30, 3)
    members = np.concatenate([image[:2, :4].reshape(-1, 3), image[2:, 4:].reshape(-1, 3)])
    for row, column in ((0, 0), (0, 1), (1, 2)):
        assert np.abs(picture[10 * row + 2, 10 * column + 2] - members.mean(0)).max() <= 0.5
    np.testing.assert_array_equal(picture[10:19, :9], enlarge(image[2:, :2], 5)[:9, :9])
    assert (picture[9, :20] == LINE).all() and (picture[:10, 19] == LINE).all()  # line around the group
    # No line within the group, and none between two patches that are not merged.
    assert not (picture[:9, 9] == LINE).all() and not (picture[10:, 9] == LINE).all()


def test_heat_map_is_brightest_at_the_largest_value_and_fades_without_value():
    image, values = np.zeros((24, 24, 3), np.uint8), np.full(36, 0.01)
    values[7], values[8] = 0.3, np.nan
    picture = heat_map(image, values, PATCH)
    means = picture.reshape(6, PATCH, 6, PATCH, 3).mean((1, 3, 4)).ravel()
    assert means[8] > means[7] > means[0]
    assert np.abs(picture[4, 4] - 0.78 * HEAT_COLOURS[-1]).max() < 1
    np.testing.assert_array_equal(heat_map(image, np.full(36, np.nan), PATCH)[0, 0], heat_map(
        image, values, PATCH)[4, 8])


def test_draw_tokens_fades_hidden_patches_to_the_given_colour():
    image = make_image()
    picture = draw_tokens(image, [], PATCH, dim=0, faded=(1, 2, 3))
    np.testing.assert_array_equal(picture, np.broadcast_to((1, 2, 3), image.shape))
