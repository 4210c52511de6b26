"""RandAugment against what timm 0.4.12 made of the same image under Pillow 13.0.0: equal, pixel for pixel."""

import json
import math
import pathlib
import pickle

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from evit_jax.data.transforms import augment

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden_recipe'
CASES = json.loads((GOLDEN / 'randaug_cases.json').read_text())
WANT = json.loads((GOLDEN / 'statistics.json').read_text())['randaugment']
RECORDED = dict(np.load(GOLDEN / 'randaug_images.npz'))
PICTURE = Image.fromarray(RECORDED['input'])
DRAWS = WANT['draws']


def share(magnitude, sign):
    return (-1 if sign < 0 else 1) * min(magnitude or 0, CASES['max_level']) / CASES['max_level']


def within(got, want, stderr):
    """Two samples of one law, as large as each other, differ by less: four standard errors of the difference."""
    return abs(got - want) <= 4 * math.sqrt(2) * stderr


def test_operations_are_the_references_in_its_order():
    assert list(augment.OPS) == CASES['ops']
    assert {name for name, op in augment.OPS.items() if op.signed} == {
        name for name, signed in CASES['takes_sign'].items() if signed}
    assert list(augment.FILL) == CASES['fill'] and CASES['max_level'] == augment.MAX_MAGNITUDE


@pytest.mark.parametrize('case', CASES['cases'], ids=lambda case: f"{case['op']} {case['magnitude']} {case['sign']}")
def test_operation_gives_the_recorded_image(case):
    op = augment.OPS[case['op']]
    got = op.apply(PICTURE, op.level(share(case['magnitude'], case['sign'])))
    assert got.mode == 'RGB'
    np.testing.assert_array_equal(np.asarray(got), RECORDED['images'][case['index']])


@pytest.mark.parametrize('name', CASES['level_table'])
def test_magnitudes_map_to_the_recorded_levels(name):
    op = augment.OPS[name]
    for row in CASES['level_table'][name]:
        assert [op.level(share(row['magnitude'], 1))] == row['positive']
        assert not op.signed or [op.level(share(row['magnitude'], -1))] == row['negative']


@pytest.fixture(scope='module')
def drawn():
    policy, rng = augment.from_policy('rand-m9-mstd0.5-inc1'), np.random.default_rng(0)
    return [policy.draw(rng) for _ in range(DRAWS)]


def test_every_operation_is_drawn_as_often_as_any_and_half_of_them_applied(drawn):
    expected = DRAWS * WANT['config']['num_layers'] / len(augment.OPS) / 2
    names = [name for ops in drawn for name, _ in ops]
    for name in augment.OPS:
        assert within(names.count(name), WANT['applied_per_op'][name], math.sqrt(expected)), name
    sizes = np.bincount([len(ops) for ops in drawn], minlength=3) / DRAWS
    for got, want in zip(sizes, WANT['ops_applied_per_image_share'], strict=True):
        assert within(got, want, math.sqrt(want * (1 - want) / DRAWS))


def test_an_operation_can_be_drawn_twice_and_the_order_is_free(drawn):
    pairs = [(first[0], second[0]) for first, second in (ops for ops in drawn if len(ops) == 2)]
    want = WANT['expected_same_op_twice_share']
    same = np.mean([first == second for first, second in pairs])
    assert within(same, want, math.sqrt(want * (1 - want) / len(pairs)))
    order = list(augment.OPS)
    later = np.mean([order.index(first) > order.index(second) for first, second in pairs])
    assert within(later, (1 - want) / 2, math.sqrt(0.25 / len(pairs)))


def test_magnitudes_signs_and_bits_have_the_recorded_statistics(drawn):
    magnitudes = np.array([abs(by) for ops in drawn for _, by in ops]) * augment.MAX_MAGNITUDE
    want = WANT['magnitude']
    assert within(magnitudes.mean(), want['mean'], want['stderr_of_mean'])
    assert within(magnitudes.std(), want['std'], want['std'] / math.sqrt(2 * want['n']))
    assert magnitudes.max() == augment.MAX_MAGNITUDE
    clipped = want['share_clipped_at_10']
    assert within((magnitudes == augment.MAX_MAGNITUDE).mean(), clipped, math.sqrt(clipped / want['n']))
    signs = np.array([by < 0 for ops in drawn for name, by in ops if augment.OPS[name].signed])
    assert within(signs.mean(), WANT['negative_share'], math.sqrt(0.25 / len(signs)))
    assert all(by >= 0 for ops in drawn for name, by in ops if not augment.OPS[name].signed)
    posterize = augment.OPS['PosterizeIncreasing'].level
    bits = [posterize(by) for ops in drawn for name, by in ops if name == 'PosterizeIncreasing']
    for kept, count in WANT['posterize_bits_kept_counts'].items():
        assert within(bits.count(int(kept)), count, math.sqrt(count)), kept


@pytest.mark.parametrize('policy, want', [
    ('rand-m9-mstd0.5-inc1', augment.RandAugment(9, 0.5, 2)), ('rand-inc1', augment.RandAugment(10, 0, 2)),
    ('rand-n3-inc1-m7.5', augment.RandAugment(7.5, 0, 3)), ('3a', augment.ThreeAugment(augment.ColourJitter(0.3))),
    ('none', augment.ColourJitter(0.3)), ('', augment.ColourJitter(0.3))])
def test_policy_is_read_as_timm_writes_it(policy, want):
    assert augment.from_policy(policy, colour_jitter=0.3) == want


@pytest.mark.parametrize('policy, message', [
    ('random', "unknown augmentation policy 'random' .there are 'rand-m9-mstd0.5-inc1', '3a', 'jitter' and 'none'"),
    ('3a-m9', "unknown augmentation policy '3a-m9'"),
    ('rand-m9-w0-inc1', "'w0' is unknown or repeated .there are m0 to m10, mstd0.5, n2 and inc1"),
    ('rand-m9-m8-inc1', "'m8' is unknown or repeated"),
    ('rand-m-inc1', "'m' is unknown"), ('rand-m9--inc1', "'' is unknown"), ('rand-m9-inc0', "'inc0' is unknown"),
    ('rand-m9-n1.5-inc1', "'n1.5' is unknown"),
    ('rand-m9-mstd0.5', "lacks inc1: .*did you mean 'rand-m9-mstd0.5-inc1'"),
    ('rand-m11-inc1', r'magnitude 11 of RandAugment is outside \[0, 10\]'),
    ('rand-n0-inc1', 'RandAugment with 0 operations'),
])
def test_policy_that_is_not_understood_is_refused(policy, message):
    with pytest.raises(ValueError, match=message):
        augment.from_policy(policy)


def test_negative_colour_jitter_is_refused():
    with pytest.raises(ValueError, match=r'colour_jitter=-0\.1 is negative'):
        augment.from_policy('none', -0.1)


@pytest.mark.parametrize('policy', ['rand-m9-mstd0.5-inc1', '3a', 'none'])
def test_augmentation_is_a_function_of_its_generator_and_travels_to_workers(policy):
    apply = augment.from_policy(policy, colour_jitter=0.3)
    sent = pickle.loads(pickle.dumps(apply))
    seen = set()
    for seed in range(12):
        made = apply(PICTURE, np.random.default_rng(seed))
        assert made.size == PICTURE.size and made.mode == 'RGB'
        assert made.tobytes() == sent(PICTURE, np.random.default_rng(seed)).tobytes()
        seen.add(made.tobytes())
    assert len(seen) > 6
    assert PICTURE.tobytes() == RECORDED['input'].tobytes()


def test_randaugment_applies_what_it_draws_one_after_the_other():
    policy = augment.from_policy('rand-m9-mstd0.5-inc1')
    for seed in range(30):
        want = PICTURE
        for name, by in policy.draw(np.random.default_rng(seed)):
            want = augment.OPS[name].apply(want, augment.OPS[name].level(by))
        assert policy(PICTURE, np.random.default_rng(seed)).tobytes() == want.tobytes()


def test_colour_jitter_has_no_part_in_randaugment():
    for seed in range(10):
        plain, other = (augment.from_policy('rand-m9-mstd0.5-inc1', jitter)(PICTURE, np.random.default_rng(seed))
                        for jitter in (0, 0.9))
        assert plain.tobytes() == other.tobytes()


def test_three_augment_is_grey_solarized_or_blurred_each_a_third_of_the_time():
    apply, rng = augment.from_policy('3a'), np.random.default_rng(0)
    grey, solarized = ImageOps.grayscale(PICTURE).convert('RGB').tobytes(), ImageOps.solarize(PICTURE, 128).tobytes()
    made = [apply(PICTURE, rng) for _ in range(600)]
    blurred = [picture for picture in made if picture.tobytes() not in (grey, solarized)]
    counts = [sum(picture.tobytes() == one for picture in made) for one in (grey, solarized)] + [len(blurred)]
    assert all(abs(count - 200) < 4 * math.sqrt(600 * 2 / 9) for count in counts)

    def roughness(picture):
        return np.abs(np.diff(np.asarray(picture, int), axis=1)).mean()

    least, most = (roughness(PICTURE.filter(ImageFilter.GaussianBlur(radius))) for radius in (2, 0.1))
    rough = [roughness(picture) for picture in blurred]
    assert least <= min(rough) < 1.05 * least and 0.95 * most < max(rough) <= most


def test_three_augment_ends_with_the_colour_jitter(monkeypatch):
    monkeypatch.setattr(augment.ColourJitter, '__call__', lambda self, picture, rng: (self.strength, picture.size))
    assert augment.from_policy('3a', 0.3)(PICTURE, np.random.default_rng(0)) == (0.3, PICTURE.size)


def test_colour_jitter_draws_order_and_factors_anew(monkeypatch):
    """Against torchvision's ColorJitter: three enhancements in any order, factors uniform in 1 ± strength."""
    calls = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __call__(self, picture):
            self.picture = picture
            return self

        def enhance(self, factor):
            calls.append((self.name, factor))
            return self.picture

    for name in ('Brightness', 'Contrast', 'Color'):
        monkeypatch.setattr(ImageEnhance, name, Recorder(name))
    rng = np.random.default_rng(0)
    for _ in range(1000):
        augment.ColourJitter(0.3)(PICTURE, rng)
    orders = {tuple(name for name, _ in calls[i:i + 3]) for i in range(0, len(calls), 3)}
    assert len(orders) == 6 and all(len(set(order)) == 3 for order in orders)
    factors = np.array([factor for _, factor in calls])
    assert 0.7 <= factors.min() < 0.705 and 1.295 < factors.max() <= 1.3
    assert abs(factors.mean() - 1) < 4 * 0.6 / math.sqrt(12 * len(factors))
    calls.clear()
    augment.ColourJitter(2.0)(PICTURE, rng)
    assert all(0 <= factor <= 3 for _, factor in calls)


def test_no_colour_jitter_changes_nothing():
    assert augment.from_policy('none')(PICTURE, np.random.default_rng(0)) is PICTURE
