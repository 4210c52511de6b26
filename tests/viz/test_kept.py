"""Rows and pages of images with the tokens of each stage."""

import numpy as np
import pytest

from evit_jax.viz import kept
from evit_jax.viz import page as pages
from evit_jax.viz.kept import kept_grid, kept_row
from tests.helpers.pictures import PATCH, make_image, patch_of


def test_kept_row_is_the_image_and_then_each_stage_enlarged():
    image, stages = make_image(), [np.arange(10), np.array([5, 6, -1])]
    row = kept_row(image, stages, PATCH, scale=3, gap=7)
    assert row.shape == (48, 3 * 48 + 2 * 7, 3)
    np.testing.assert_array_equal(row[:, :48], image.repeat(3, 0).repeat(3, 1))
    for stage, ids in enumerate(stages, 1):
        left = stage * (48 + 7)
        np.testing.assert_array_equal(row[:, left - 7:left], 255)
        for number in range(16):
            picture, plain = patch_of(row[:, left:left + 48], number, 12), patch_of(row[:, :48], number, 12)
            assert (picture == plain).all() if number in ids else (picture > plain).all()


def find(page, part):
    """Returns every position (y, x) of `part` in the page."""
    page, (height, width) = np.asarray(page), part.shape[:2]
    starts = np.argwhere((page[:-height + 1, :-width + 1] == part[0, 0]).all(-1))
    return [(y, x) for y, x in starts.tolist() if (page[y:y + height, x:x + width] == part).all()]


def make_page(count=3, **options):
    images = np.stack([make_image(seed) for seed in range(count)])
    stages = [np.stack([np.random.default_rng(seed).permutation(16)[:keep] for seed in range(count)])
              for keep in (8, 4)]
    return images, stages, kept_grid(images, stages, PATCH, **options)


def test_kept_grid_aligns_the_stages_of_all_images():
    images, stages, page = make_page(count=3, columns=2)
    positions = []
    for number, image in enumerate(images):
        for ids in (range(16), stages[0][number], stages[1][number]):
            (position,) = find(page, kept_row(image, [ids], PATCH, scale=8, gap=0)[:, 128:])
            positions.append(position)
    y, x = np.array(positions).reshape(3, 3, 2).transpose(2, 0, 1)  # [image, stage]
    assert (y[0] == y[1]).all() and (y[2] > y[0]).all()
    assert (x[0] == x[2]).all() and (np.diff(x, axis=1) > 128).all() and x[1, 0] > x[0, 2]


@pytest.fixture
def texts(monkeypatch):
    """Records the texts on a page, in order: (text, colour)."""
    written, write = [], pages.write

    def record(page, x, y, text, colour, size, width):
        written.append((text, colour))
        return write(page, x, y, text, colour, size, width)

    monkeypatch.setattr(pages, 'write', record)
    return written


def test_kept_grid_headers_count_patches_without_fused_tokens(texts):
    stages = [np.array([[0, 1, 2, -1], [4, 5, 6, -1]]), np.array([[0, -1, -2], [4, 5, -2]])]
    kept_grid(np.stack([make_image(), make_image(1)]), stages, PATCH, columns=1)
    assert [text for text, _ in texts] == [
        'image', '16 patches', 'stage 1', '3 of 16, 19 %', 'stage 2', '1 to 2 of 16, 9 %']


def test_kept_grid_colours_right_and_wrong_predictions(texts):
    _, _, page = make_page(count=2, predictions=np.array([1, 0]), truths=[1, 1], class_names=['cat', 'dog'])
    assert texts[-4:] == [('predicted dog', kept.RIGHT), ('truth dog', pages.GREY),
                          ('predicted cat', kept.WRONG), ('truth dog', pages.DARK)]
    for colour in (kept.RIGHT, kept.WRONG):
        assert (np.asarray(page) == colour).all(-1).any()


def test_kept_grid_prediction_without_truth_is_black(texts):
    make_page(count=1, predictions=[3])
    assert texts[-1] == ('predicted 3', pages.DARK)


def test_kept_grid_shortens_long_names():
    width = make_page(count=1, predictions=[0], truths=[0], class_names=['w'])[2].width
    _, _, page = make_page(count=1, predictions=[0], truths=[0], class_names=['hen of the woods, ' * 20])
    assert page.width == width
    margin = np.asarray(page)[:, -20:]
    assert (margin == 255).all()


@pytest.mark.parametrize('options, message', [
    ({'predictions': [1, 2]}, 'predictions has 2 rows for 3 images'),
    ({'token_of_patch': [np.zeros((3, 16), int)]}, 'token_of_patch has 1 stages, kept has 2'),
])
def test_kept_grid_lengths_that_do_not_match_raise(options, message):
    with pytest.raises(ValueError, match=message):
        make_page(**options)


def test_kept_grid_headers_count_merged_tokens(texts):
    images, token_of_patch = np.zeros((2, 4, 4, 3), np.uint8), np.array([[0, 1, 1, 2]] * 2)
    kept_grid(images, [np.array([[0, 1, 3]] * 2)], 2, token_of_patch=[token_of_patch])
    assert '3 tokens, 75 %' in str(texts)
