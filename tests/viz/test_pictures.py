import numpy as np
import pytest
from PIL import Image

from evit_jax.viz import curves, kept
from evit_jax.viz import page as pages
from evit_jax.viz.curves import training_curves
from evit_jax.viz.groups import LINE, groups_filled
from evit_jax.viz.kept import dim_dropped, kept_grid, kept_row

PATCH = 4


def make_image(seed=0, side=16):
    """Dark noise: 16 patches of 4x4, nothing in it as light as a faded patch."""
    return np.random.default_rng(seed).integers(0, 120, (side, side, 3), np.uint8)


def patch_of(image, number, size=PATCH):
    row, column = divmod(number, image.shape[1] // size)
    return image[row * size:(row + 1) * size, column * size:(column + 1) * size]


def test_kept_patches_are_unchanged_and_dropped_ones_lighter():
    image, ids = make_image(), [0, 6, 15]
    drawn = dim_dropped(image, np.array(ids), PATCH)
    assert drawn.dtype == np.uint8
    for number in range(16):
        if number in ids:
            np.testing.assert_array_equal(patch_of(drawn, number), patch_of(image, number))
        else:
            assert (patch_of(drawn, number) > patch_of(image, number)).all()


def test_dim_is_the_contrast_that_dropped_patches_keep():
    image = make_image()

    def spread(dim):
        return np.ptp(dim_dropped(image, np.array([], int), PATCH, dim)[..., 0].astype(int))

    assert spread(0) == 0
    assert spread(0.5) == pytest.approx(spread(1) / 2, abs=1)
    np.testing.assert_array_equal(dim_dropped(image, [], PATCH, 0), np.broadcast_to(kept.FADED, image.shape))


def test_fused_tokens_cover_no_patch_and_order_does_not_matter():
    image = make_image()
    np.testing.assert_array_equal(
        dim_dropped(image, np.array([9, -1, 2, -3]), PATCH), dim_dropped(image, np.array([2, 9]), PATCH))


def test_images_that_are_not_square_have_their_own_grid():
    image = make_image()[:8]  # 2 rows of 4 patches
    np.testing.assert_array_equal(patch_of(dim_dropped(image, [4], PATCH), 4), image[4:8, :4])
    with pytest.raises(ValueError, match='patch 8 is outside the 2x4 grid'):
        dim_dropped(image, [8], PATCH)


@pytest.mark.parametrize('image, patch, ids, message', [
    (make_image(), PATCH, [3, 16], r'patch 16 is outside the 4x4 grid, 0 to 15'),
    (make_image(), 5, [0], r'16x16 pixels is not a whole number of patches of 5'),
    (make_image() / 255, PATCH, [0], r'float64 \[16, 16, 3\]: give uint8'),
    (make_image()[..., 0], PATCH, [0], r'uint8 \[16, 16\]: give uint8 \[H, W, 3\]'),
])
def test_what_cannot_be_drawn_is_named(image, patch, ids, message):
    with pytest.raises(ValueError, match=message):
        dim_dropped(image, np.array(ids), patch)


def test_row_is_the_image_then_each_stage_enlarged_pixel_by_pixel():
    image, stages = make_image(), [np.arange(10), np.array([5, 6, -1])]
    row = kept_row(image, stages, PATCH, scale=3, gap=7)
    assert row.shape == (48, 3 * 48 + 2 * 7, 3)
    np.testing.assert_array_equal(row[:, :48], image.repeat(3, 0).repeat(3, 1))
    for stage, ids in enumerate(stages, 1):
        left = stage * (48 + 7)
        np.testing.assert_array_equal(row[:, left - 7:left], 255)
        for number in range(16):
            drawn, plain = patch_of(row[:, left:left + 48], number, 12), patch_of(row[:, :48], number, 12)
            assert (drawn == plain).all() if number in ids else (drawn > plain).all()


def find(page, part):
    """Where `part` lies in the page: (y, x) of every place."""
    page, (height, width) = np.asarray(page), part.shape[:2]
    starts = np.argwhere((page[:-height + 1, :-width + 1] == part[0, 0]).all(-1))
    return [(y, x) for y, x in starts.tolist() if (page[y:y + height, x:x + width] == part).all()]


def make_page(count=3, **options):
    images = np.stack([make_image(seed) for seed in range(count)])
    stages = [np.stack([np.random.default_rng(seed).permutation(16)[:keep] for seed in range(count)])
              for keep in (8, 4)]
    return images, stages, kept_grid(images, stages, PATCH, **options)


def test_grid_holds_every_stage_of_every_image_in_aligned_columns():
    images, stages, page = make_page(count=3, columns=2, scale=4)
    places = []
    for number, image in enumerate(images):
        for ids in (range(16), stages[0][number], stages[1][number]):
            (place,) = find(page, kept_row(image, [ids], PATCH, scale=4, gap=0)[:, 64:])
            places.append(place)
    y, x = np.array(places).reshape(3, 3, 2).transpose(2, 0, 1)  # [image, stage]
    assert (y[0] == y[1]).all() and (y[2] > y[0]).all()
    assert (x[0] == x[2]).all() and (np.diff(x, axis=1) > 64).all() and x[1, 0] > x[0, 2]


@pytest.fixture
def texts(monkeypatch):
    """What is written on a page, in order: (text, colour)."""
    written, write = [], pages.write

    def record(page, x, y, text, colour, size, width):
        written.append((text, colour))
        return write(page, x, y, text, colour, size, width)

    monkeypatch.setattr(pages, 'write', record)
    return written


def test_headers_count_patches_and_not_fused_tokens(texts):
    stages = [np.array([[0, 1, 2, -1], [4, 5, 6, -1]]), np.array([[0, -1, -2], [4, 5, -2]])]
    kept_grid(np.stack([make_image(), make_image(1)]), stages, PATCH, titles=['block 3', 'block 6'], columns=1)
    assert [text for text, _ in texts] == [
        'image', '16 patches', 'block 3', '3 of 16, 19 %', 'block 6', '1 to 2 of 16, 9 %']


def test_prediction_is_green_when_right_and_red_when_wrong(texts):
    _, _, page = make_page(count=2, predictions=np.array([1, 0]), truths=[1, 1], class_names=['cat', 'dog'])
    assert texts[-4:] == [('predicted dog', kept.RIGHT), ('truth dog', pages.GREY),
                          ('predicted cat', kept.WRONG), ('truth dog', pages.DARK)]
    for colour in (kept.RIGHT, kept.WRONG):
        assert (np.asarray(page) == colour).all(-1).any()


def test_a_prediction_without_truth_takes_no_side(texts):
    make_page(count=1, predictions=[3])
    assert texts[-1] == ('predicted 3', pages.DARK)


def test_long_names_stay_in_their_column():
    width = make_page(count=1, predictions=[0], truths=[0], class_names=['w'])[2].width
    _, _, page = make_page(count=1, predictions=[0], truths=[0], class_names=['hen of the woods, ' * 20])
    assert page.width == width
    margin = np.asarray(page)[:, -20:]
    assert (margin == 255).all()


@pytest.mark.parametrize('options, message', [
    ({'predictions': [1, 2]}, 'predictions has 2 rows for 3 images'),
    ({'titles': ['one']}, '1 titles for 2 stages'),
])
def test_lengths_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_page(**options)


RECORDS = [{'step': step, 'train/loss': 2.5 - step / 50, 'train/lr': 1e-3, 'train/keep_rate': 1 - step / 400}
           for step in range(10, 101, 10)]
RECORDS += [{'step': 50, 'eval/top1': 0.5, 'eval/top1_ema': 0.4},
            {'step': 100, 'eval/top1': 0.951, 'eval/top1_ema': 0.9625}]


@pytest.fixture
def ends(monkeypatch):
    """The last values that are written, by their text."""
    written, write = [], curves.write_ends

    def record(ax, ends):
        written.extend(text for _, text, _ in ends)
        write(ax, ends)

    monkeypatch.setattr(curves, 'write_ends', record)
    return written


def test_curves_name_the_last_value_of_each_series(tmp_path, ends):
    training_curves(RECORDS, tmp_path / 'curves.png', title='a run')
    assert ends[1:] == ['95.1 %\nweights', '96.2 %\nEMA', '0.75', '1e-3']
    with Image.open(tmp_path / 'curves.png') as picture:
        assert len(picture.convert('RGB').getcolors(1 << 20)) > 50


def test_missing_series_leave_out_their_panel(tmp_path, ends):
    sizes = []
    for names in (['train/loss', 'train/keep_rate'], ['train/loss']):
        records = [{name: value for name, value in record.items() if name in ['step', *names]} for record in RECORDS]
        training_curves(records, tmp_path / 'curves.png')
        with Image.open(tmp_path / 'curves.png') as picture:
            sizes.append(picture.height)
    assert len(ends) == 3 and sizes[0] > sizes[1]
    with pytest.raises(ValueError, match='nothing to draw: no record holds train/loss'):
        training_curves([{'step': 1, 'train/images_per_second': 3.0}], tmp_path / 'curves.png')


def test_values_that_are_not_finite_are_left_out(tmp_path):
    records = [{'step': 1, 'train/loss': float('nan')}, {'step': 2, 'train/loss': 2.0}, {'step': 3}]
    steps, values = curves.curve(records, 'train/loss')
    assert (steps.tolist(), values.tolist()) == ([2], [2])
    training_curves(records, tmp_path / 'curves.png')


def test_smoothing_keeps_a_slope_and_shrinks_noise():
    slope = np.linspace(5, 1, 200)
    np.testing.assert_allclose(curves.smoothed(slope, 10)[15:-15], slope[15:-15])
    np.testing.assert_allclose(curves.smoothed(np.full(7, 3.0), 10), 3)
    noise = np.random.default_rng(0).normal(size=200)
    assert curves.smoothed(noise, 10).std() < 0.5 * noise.std()


def test_groups_are_filled_with_their_mean_and_patches_alone_are_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)  # 2 x 3 patches of 2 x 2 pixels
    token_of_patch = np.array([0, 0, 1, 2, 3, 0])
    picture = groups_filled(image, token_of_patch, 2, scale=5)
    assert picture.shape == (20, 30, 3)
    members = np.concatenate([image[:2, :4].reshape(-1, 3), image[2:, 4:].reshape(-1, 3)])
    for row, column in ((0, 0), (0, 1), (1, 2)):
        assert np.abs(picture[10 * row + 2, 10 * column + 2] - members.mean(0)).max() <= 0.5
    np.testing.assert_array_equal(picture[10:19, :9], pages.enlarged(image[2:, :2], 5)[:9, :9])
    assert (picture[9, :20] == LINE).all() and (picture[:10, 19] == LINE).all()  # around the group
    assert not (picture[:9, 9] == LINE).all() and not (picture[10:, 9] == LINE).all()  # within it; between two alone


def test_groups_of_another_image_are_an_error():
    with pytest.raises(ValueError, match='home is of 5 patches, the image has 2x3'):
        groups_filled(np.zeros((4, 6, 3), np.uint8), np.arange(5), 2)


def test_headers_count_merged_tokens(texts):
    images, token_of_patch = np.zeros((2, 4, 4, 3), np.uint8), np.array([[0, 1, 1, 2]] * 2)
    kept_grid(images, [np.array([[0, 1, 3]] * 2)], 2, token_of_patch=[token_of_patch])
    assert '3 tokens, 75 %' in str(texts)
