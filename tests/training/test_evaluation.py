"""Evaluation metrics of batches with given outputs."""

import numpy as np
import pytest

from evit_jax.runtime import distributed
from evit_jax.training.evaluation import evaluate, object_patches, patch_shares


def test_evaluate_counts_each_image_once_and_no_padding():
    def step(batch):
        right = batch['label'] == 1
        return {'loss': np.ones(4), 'right': right, 'right5': right, 'prediction': batch['label'],
                'kept': (np.array([[0, -1]] * 4),), 'token_of_patch': (np.array([[0, 1, 1, 1]] * 4),)}

    mask = np.zeros((4, 4, 4), bool)
    mask[:, :2, :2] = True
    batches = [{'image': np.zeros((4, 4, 4, 3), np.uint8), 'label': np.array(labels), 'weight': np.array(weights),
                'mask': mask, 'index': np.arange(4)}
               for labels, weights in (([1, 1, 0, 0], [1., 1, 1, 1]), ([1, 1, 1, 1], [1., 0, 0, 0]))]
    result = evaluate(step, batches, lambda batch: batch, patches=4, sample=8)
    assert result.metrics['top1'] == 3 / 5
    assert len(result.sample['image']) == len(result.sample['kept'][0]) == 5  # without padding
    assert result.metrics['object_kept_1'] == 1.0
    assert result.metrics['random_kept_1'] == 0.25


def test_evaluate_without_a_readable_image_is_refused():
    def step(batch):
        return {'loss': np.zeros(2), 'right': np.zeros(2), 'right5': np.zeros(2), 'prediction': np.zeros(2), 'kept': (),
                'token_of_patch': ()}

    unreadable = {'image': np.zeros((2, 4, 4, 3), np.uint8), 'label': np.zeros(2, int), 'weight': np.zeros(2)}
    with pytest.raises(ValueError, match='none of the images to evaluate on could be read'):
        evaluate(step, [unreadable], lambda batch: batch, patches=4)


def test_object_patches_are_row_major():
    mask = np.zeros((1, 4, 4), bool)
    mask[0, 2:, :2] = True
    assert object_patches(mask, 4).tolist() == [[False, False, True, False]]


def test_patch_shares_of_merged_patches_sum_to_one_per_token():
    token_of_patch = np.array([[0, 1, 1, 2], [0, 0, 0, -1]])
    kept = np.array([[0, 1, 3], [0, 1, 2]])
    np.testing.assert_allclose(patch_shares(kept, token_of_patch), [[1, 1 / 2, 1 / 2, 1], [1 / 3, 1 / 3, 1 / 3, 0]])


def test_patch_shares_of_dropped_and_fused_patches_are_zero():
    np.testing.assert_array_equal(patch_shares(np.array([[1, 3]]), np.array([[-1, 0, -1, 1]])), [[0, 1, 0, 1]])
    np.testing.assert_array_equal(patch_shares(np.array([[3, -1]]), np.array([[1, 1, 1, 0]])), [[0, 0, 0, 1]])


def test_evaluate_sums_in_float64_and_over_processes(monkeypatch):
    """A sum of 2**24 + 1 images in float32 would lose one image."""
    losses, weights = np.array([2.0**24, 1.0]), np.ones(2)

    def step(batch):
        right = np.ones(2, bool)
        return {'loss': losses, 'right': right, 'right5': right, 'prediction': batch['label'], 'kept': (),
                'token_of_patch': ()}

    batch = {'image': np.zeros((2, 4, 4, 3), np.uint8), 'label': np.zeros(2, int), 'weight': weights}
    assert evaluate(step, [batch], lambda batch: batch, patches=4).metrics['loss'] == (2**24 + 1) / 2
    monkeypatch.setattr(distributed, 'sum_over_processes', lambda sums: {
        name: 3 * value for name, value in sums.items()})
    metrics = evaluate(step, [batch], lambda batch: batch, patches=4).metrics
    assert (metrics['images'], metrics['loss'], metrics['top1']) == (6, (2**24 + 1) / 2, 1)
