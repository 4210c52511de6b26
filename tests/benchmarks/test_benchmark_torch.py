"""The plain PyTorch EViT is our model, and is measured beside it. Where PyTorch is not installed, most is skipped."""

import importlib.util
import sys

import jax
import numpy as np
import pytest

from evit_jax import models
from evit_jax.benchmarks import model, model_tables, subjects, torch_evit
from evit_jax.models.lvvit import LVViTConfig
from tests.benchmarks.test_benchmark_model import cases, measure, tiny  # noqa: F401

needs_torch = pytest.mark.skipif(importlib.util.find_spec('torch') is None,
                                 reason='PyTorch is not installed: the extra [torch]')


def test_without_torch_the_way_out_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(ValueError, match=r"not installed here: pip install -e '\.\[torch\]', or leave --against out"):
        measure(cases(), against=True)


@needs_torch
@pytest.mark.parametrize('rate, fused', [(1.0, True), (0.5, True), (0.5, False)])
@pytest.mark.parametrize('name', ['tiny', 'vit_digits', 'lvvit_least'])
def test_plain_torch_gives_our_logits(name, rate, fused, monkeypatch):
    least = LVViTConfig(image_size=32, patch_size=8, width=16, depth=4, heads=2, stem_width=4, init_std=0.2)
    monkeypatch.setitem(models.CONFIGS, 'lvvit_least', least)
    torch_evit.set_up('cpu', threads=2, programs=1)
    stock, (case,) = subjects.ModelCache(), cases(names=[name], rates=[rate], fuse=[fused])
    ours = subjects.inference(case, stock)
    want = ours.fetch(ours.call(1))
    for engine in (torch_evit.EAGER, torch_evit.PLAIN):
        other = subjects.baseline(case, engine, stock)
        np.testing.assert_allclose(other.fetch(other.call(1)), want, rtol=0, atol=1e-5 * np.abs(want).max())


@needs_torch
def test_torch_with_other_weights_or_another_plan_does_not_pass():
    stock, (dense, case) = subjects.ModelCache(), cases()
    ours = subjects.inference(case, stock)
    with pytest.raises(ValueError, match='differ from ours'):
        model.agree(ours, subjects.baseline(dense, torch_evit.EAGER, stock))
    other, params = subjects.ModelCache(), jax.device_get(stock.params(case.config))
    params['blocks'][2]['attn']['qkv']['kernel'] = params['blocks'][2]['attn']['qkv']['kernel'] * 0.9
    other.params = lambda shape: params
    with pytest.raises(ValueError, match='differ from ours'):
        model.agree(ours, subjects.baseline(case, torch_evit.EAGER, other))


@needs_torch
def test_torch_is_compiled_and_measured_in_the_same_rounds():
    found = measure(cases(rates=[0.5]), against=True)
    assert [row['engine'] for row in found['rows']] == ['jax', *torch_evit.RIVALS]
    assert found['rows'][3]['compile_seconds'] > 0 and found['rows'][1]['compile_seconds'] is None
    ours, *others = found['rows']
    for row in others:
        ratios = np.divide(row['seconds_per_call'], ours['seconds_per_call'])
        assert row['ours_over_this'] == pytest.approx(np.median(ratios))
    assert len(model_tables.tables(found)) == 2 and found['torch']


@needs_torch
def test_torch_on_a_device_that_it_lacks_is_refused():
    with pytest.raises(ValueError, match=r'JAX computes on tpu, and torch .* cannot'):
        torch_evit.set_up('tpu', threads=1, programs=1)
