"""Objectives against numpy: the value and weight of each term, and the tokens that it excludes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.data.token_labels import mixtoken
from evit_jax.data.token_labels.mixtoken import Sparse
from evit_jax.models.embedding import to_patches
from evit_jax.training import objectives
from evit_jax.training.objectives import Objective, Targets, Taught, Term

B, P, L, D, K = 6, 16, 7, 4, 3
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def entropy(logits, targets):
    return -(targets * np.log(softmax(logits))).sum(-1)


def kl(teacher, student):
    return (softmax(teacher) * (np.log(softmax(teacher)) - np.log(softmax(student)))).sum(-1)


LOGITS, CLS, DIST, TAUGHT = (normal(B, L) for _ in range(4))
LABEL = softmax(normal(B, L))
INTERMEDIATES = {'cls_logits': CLS, 'dist_logits': DIST}
TEACHER = Taught(TAUGHT, normal(B, P, D))


def evaluate(objective, intermediates=None, targets=None):
    return objective(jnp.asarray(LOGITS), INTERMEDIATES | (intermediates or {}), targets or Targets(LABEL), TEACHER)


def test_classification_loss_is_the_cross_entropy_of_the_evaluated_logits():
    loss, parts = evaluate(objectives.classification_loss())
    np.testing.assert_allclose(loss, entropy(LOGITS, LABEL).mean(), rtol=1e-6)
    assert parts == {}


def test_hard_distillation_trains_one_head_on_labels_and_the_other_on_the_teachers_class():
    loss, parts = evaluate(objectives.distillation_loss('hard', alpha=0.3, tau=3.0))
    want = {'loss/labels': entropy(CLS, LABEL).mean(),
            'loss/teacher': entropy(DIST, np.eye(L)[TAUGHT.argmax(1)]).mean()}
    assert parts.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-6)
    np.testing.assert_allclose(loss, 0.7 * want['loss/labels'] + 0.3 * want['loss/teacher'], rtol=1e-6)


def test_soft_distillation_is_the_mean_over_classes_times_tau_squared():
    loss, parts = evaluate(objectives.distillation_loss('soft', alpha=0.5, tau=3.0))
    want = 9 * kl(TAUGHT / 3, DIST / 3).sum() / (B * L)
    np.testing.assert_allclose(parts['loss/teacher'], want, rtol=1e-5)
    np.testing.assert_allclose(loss, 0.5 * entropy(CLS, LABEL).mean() + 0.5 * want, rtol=1e-5)


@pytest.mark.parametrize('masked', [False, True])
def test_self_distillation_compares_kept_tokens_with_the_same_patches_of_the_teacher(masked):
    tokens = normal(B, 5, D)
    kept = np.array([RNG.permutation(P)[:5] for _ in range(B)])
    kept[:, -1] = -1  # a fused token
    mask = (RNG.random((B, 5)) < 0.6).astype(np.float32) if masked else np.ones((B, 5), np.float32)
    intermediates = {'patch_tokens': tokens, 'kept': (None, kept), 'mask': (None, mask) if masked else ()}
    loss, parts = evaluate(objectives.self_distillation_loss(weight=0.5, token_weight=0.25), intermediates)
    apart, count = 0.0, 0
    for image in range(B):
        for index, patch in enumerate(kept[image]):
            if patch >= 0 and mask[image, index]:
                apart += ((tokens[image, index] - TEACHER.tokens[image, patch]) ** 2).mean()
                count += 1
    np.testing.assert_allclose(parts['loss/tokens'], apart / count, rtol=1e-5)
    np.testing.assert_allclose(parts['loss/teacher'], kl(TAUGHT, LOGITS).mean(), rtol=1e-5)
    want = entropy(LOGITS, LABEL).mean() + 0.5 * kl(TAUGHT, LOGITS).mean() + 0.25 * apart / count
    np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_self_distillation_of_equal_tokens_without_reductions_is_zero():
    objective = objectives.self_distillation_loss(weight=0.5, token_weight=0.5)
    _, parts = evaluate(objective, {'patch_tokens': TEACHER.tokens, 'kept': ()})
    assert parts['loss/tokens'] == 0


def test_keep_ratio_loss_is_the_squared_distance_to_the_plan():
    masks = tuple((RNG.random((B, P)) < share).astype(np.float32) for share in (0.7, 0.5, 0.3))
    term = objectives.keep_ratio_loss((0.7, 0.49, 0.343), 2.0)
    loss, parts = evaluate(Objective((*objectives.classification_loss().terms, term)), {'mask': masks})
    want = np.mean([(d.mean(1) - share) ** 2 for d, share in zip(masks, (0.7, 0.49, 0.343))])
    np.testing.assert_allclose(parts['loss/kept'], want, rtol=1e-6)
    np.testing.assert_allclose(loss, entropy(LOGITS, LABEL).mean() + 2 * want, rtol=1e-6)


def test_self_distillation_gives_the_teacher_no_gradient():
    objective = objectives.self_distillation_loss(weight=1.0, token_weight=1.0)
    intermediates = INTERMEDIATES | {'patch_tokens': normal(B, P, D), 'kept': ()}
    gradient = jax.grad(lambda taught: objective(LOGITS, intermediates, Targets(LABEL), taught)[0])(TEACHER)
    assert not any(np.any(leaf) for leaf in gradient)


def sparse(*shape, floor=0.0):
    value = softmax(normal(*shape, K + 1))[..., :K]
    index = np.argsort(RNG.random((*shape, L)))[..., :K].astype(np.int32)
    return Sparse(value, index, np.full(shape, floor, np.float32) * RNG.random(shape).astype(np.float32))


def dense_of(targets):
    out = np.repeat(targets.floor[..., None], L, -1)
    for position in np.ndindex(targets.index.shape):
        out[(*position[:-1], targets.index[position])] += targets.value[position]
    return out


def test_token_label_loss_counts_only_kept_patches_and_no_fused_token():
    tokens, logits = sparse(B, P, floor=0.01), normal(B, 6, L)
    patch = np.array([RNG.permutation(P)[:6] for _ in range(B)], np.int32)
    patch[:, 5] = -2
    totals = []
    for fused in (0.0, 1e3):
        logits[:, 5] += fused
        loss, parts = evaluate(objectives.token_label_loss(0.5), {'token_logits': logits, 'token_patch': patch},
                         Targets(LABEL, tokens))
        totals.append(float(loss))
    full = dense_of(tokens)
    want = np.mean([entropy(logits[b, n], full[b, patch[b, n]]) for b in range(B) for n in range(5)])
    np.testing.assert_allclose(parts['loss/tokens'], want, rtol=1e-5)
    np.testing.assert_allclose(totals, entropy(CLS, LABEL).mean() + 0.5 * want, rtol=1e-5)


def test_token_label_loss_excludes_masked_tokens():
    tokens, logits = sparse(B, P), normal(B, P, L)
    patch = np.tile(np.arange(P, dtype=np.int32), (B, 1))
    mask = (RNG.random((B, P)) < 0.5).astype(np.float32)
    intermediates = {'token_logits': logits, 'token_patch': patch, 'mask': (mask,)}
    _, parts = evaluate(objectives.token_label_loss(1.0), intermediates, Targets(LABEL, tokens))
    np.testing.assert_allclose(parts['loss/tokens'], entropy(logits, dense_of(tokens))[mask > 0].mean(), rtol=1e-5)


def test_smoothed_label_map_equals_the_reference():
    value, index, lacking = sparse(B)
    got = mixtoken.dense(mixtoken.smoothed(value, index, classes=L, smoothing=0.1), L)
    maps = dense_of(Sparse(value, index, lacking + (1 - value.sum(-1)) / L))
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(got, maps * (1 - 0.1 + 0.1 / L) + 0.1 / L, rtol=1e-5)


@pytest.mark.parametrize('groups', [1, 2])
def test_mix_targets_takes_swapped_patches_from_the_partner(groups):
    labels, tokens = sparse(B, floor=0.02), sparse(B, P, floor=0.02)
    swap = RNG.random((groups, P)) < 0.4
    label, mixed = mixtoken.mix_targets(labels, tokens, swap, classes=L)
    size = B // groups
    for image in range(B):
        group, row = divmod(image, size)
        partner = group * size + size - 1 - row
        for patch in range(P):
            source = partner if swap[group, patch] else image
            np.testing.assert_array_equal(mixed.value[image, patch], tokens.value[source, patch])
            np.testing.assert_array_equal(mixed.index[image, patch], tokens.index[source, patch])
            assert mixed.floor[image, patch] == tokens.floor[source, patch]
        lam, maps = 1 - swap[group].mean(), dense_of(labels)
        np.testing.assert_allclose(label[image], lam * maps[image] + (1 - lam) * maps[partner], rtol=1e-5)


def test_draw_swaps_gives_one_box_of_varying_size():
    swap = np.asarray(mixtoken.draw_swaps(jax.random.key(0), (14, 14), 4000))
    areas = swap.sum(1)
    for box in swap[:200].reshape(-1, 14, 14):
        rows, columns = box.any(1), box.any(0)
        assert (box == rows[:, None] & columns).all()
        for side in (rows, columns):
            assert np.abs(np.diff(np.pad(side.astype(int), 1))).sum() in (0, 2)  # the True values are contiguous
    assert areas.min() == 0 and areas.max() == 12 * 12  # 13 // 2 on each side of the centre, as in the reference
    assert 0.25 < areas.mean() / 196 < 0.45  # the mean of lambda is 1/2; the border clips some boxes
    again = mixtoken.draw_swaps(jax.random.key(0), (14, 14), 4000)
    np.testing.assert_array_equal(swap, again)


def test_draw_swaps_of_a_rectangle_covers_its_rows_and_columns():
    swap = np.asarray(mixtoken.draw_swaps(jax.random.key(0), (4, 10), 400)).reshape(400, 4, 10)
    assert swap.any(axis=0).all() and swap.any(2).sum(1).max() == 2 and swap.any(1).sum(1).max() == 8


def test_draw_swaps_box_of_tokens_is_a_box_of_pixels():
    swap = np.asarray(mixtoken.draw_swaps(jax.random.key(3), (4, 4), 8))
    pixels = swap.reshape(8, 4, 4, 1).repeat(2, 1).repeat(2, 2)
    np.testing.assert_array_equal(to_patches(pixels, 2).all(-1), swap)


def test_objective_adds_a_term_of_weight_one_unscaled():
    terms = (Term('a', 1.0, lambda *_: jnp.float32(1e-8)), Term('b', 0.5, lambda *_: jnp.float32(2.0)))
    assert evaluate(Objective(terms[:1]))[0] == np.float32(1e-8)
    loss, logged = evaluate(Objective(terms))
    assert loss == 1.0 and logged == {'loss/a': np.float32(1e-8), 'loss/b': 2.0}
