"""Similarity of tokens and features: known values and loops over the images."""

import numpy as np
import pytest

from evit_jax.comparison import similarity
from evit_jax.comparison.recording import Record


def test_kept_overlap_is_the_mean_iou_over_the_images():
    first = np.asarray([[0, 1, -1, -1], [0, -1, 1, -1], [-1, -1, -1, -1]])
    second = np.asarray([[0, -1, 1, -1], [5, -1, 3, -1], [-1, -1, -1, -1]])
    assert similarity.kept_overlap(first, second) == pytest.approx((1 / 3 + 1) / 2)


def test_group_agreement_of_equal_and_nested_groups():
    groups = np.asarray([[0, 0, 1, 1, 2, -1]])
    renamed = np.asarray([[4, 4, 0, 0, 1, 3]])
    assert similarity.group_agreement(groups, renamed) == {'homogeneity': 1, 'completeness': 1, 'nmi': 1}
    coarser = np.asarray([[0, 0, 0, 0, 1, 1]])
    nested = similarity.group_agreement(groups, coarser)
    assert nested['homogeneity'] == pytest.approx(1) and 0 < nested['completeness'] < 1
    mean = 2 * nested['completeness'] / (1 + nested['completeness'])
    assert nested['nmi'] == pytest.approx(mean)


def test_linear_cka_and_procrustes_ignore_rotation_and_scale():
    rng = np.random.default_rng(0)
    x, rotation = rng.normal(size=(40, 6)), np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert similarity.linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1)
    assert similarity.procrustes_distance(x, 3 * x @ rotation + 1) == pytest.approx(0, abs=1e-9)
    other = rng.normal(size=(40, 6))
    assert similarity.linear_cka(x, other) < 0.5 and similarity.procrustes_distance(x, other) > 0.3


def test_linear_cka_equals_the_kernel_form():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(9, 3)), rng.normal(size=(9, 5))
    centre = np.eye(9) - 1 / 9
    k, l = (centre @ (features @ features.T) @ centre for features in (x, y))
    assert similarity.linear_cka(x, y) == pytest.approx((k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum()))


def test_removal_depths_count_the_blocks_that_see_each_patch():
    groups = np.asarray([[[0, 1, -1, 2], [0, 1, 2, -1]], [[0, -1, -1, 1], [0, -1, 1, -1]]], np.int16)
    record = Record(groups, np.asarray([3, 6]), np.zeros((2, 1)), np.asarray([2, 2]), np.asarray(12))
    np.testing.assert_array_equal(similarity.removal_depths(record), [[12, 6], [(3 + 12) / 2, (12 + 3) / 2]])


@pytest.mark.parametrize('sign', [1, -1])
def test_centre_correlation_of_a_radial_map_is_its_sign(sign):
    rows, columns = np.indices((5, 5)) - 2
    assert similarity.centre_correlation(-sign * np.hypot(rows, columns)) == pytest.approx(sign)
    assert np.isnan(similarity.centre_correlation(np.ones((5, 5))))
