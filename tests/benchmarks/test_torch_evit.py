"""EViT in plain PyTorch returns the logits of our model, and both are measured. Most tests need PyTorch."""

import importlib.util
import sys

import jax
import numpy as np
import pytest

from evit_jax import models
from evit_jax.benchmarks import cases, model_speed, model_tables, torch_evit
from evit_jax.models.lvvit import LVViTConfig
from tests.helpers.benchmarks import measure_briefly, tiny, tiny_workloads  # noqa: F401

needs_torch = pytest.mark.skipif(importlib.util.find_spec('torch') is None,
                                 reason='PyTorch is not installed: the extra [torch]')


def test_measure_against_torch_without_torch_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(ValueError, match=r"not installed here: pip install -e '\.\[torch\]', or leave --against out"):
        measure_briefly(tiny_workloads(), against=['torch'])


@needs_torch
@pytest.mark.parametrize('rate, fused', [(1.0, True), (0.5, True), (0.5, False)])
@pytest.mark.parametrize('name', ['tiny', 'vit_digits', 'lvvit_tiny'])
def test_torch_evit_returns_our_logits(name, rate, fused, monkeypatch):
    lvvit = LVViTConfig(image_size=32, patch_size=8, width=16, depth=4, heads=2, stem_width=4, init_std=0.2)
    monkeypatch.setitem(models.CONFIGS, 'lvvit_tiny', lvvit)
    torch_evit.configure('cpu', threads=2, programs=1)
    cache, (workload,) = cases.ModelCache(), tiny_workloads(names=[name], rates=[rate], fuse=[fused])
    ours = cases.inference_case(workload, cache)
    want = ours.fetch(ours.call(1))
    for engine in (torch_evit.EAGER, torch_evit.FULL_ATTENTION):
        other = cases.baseline_case(workload, engine, cache)
        np.testing.assert_allclose(other.fetch(other.call(1)), want, rtol=0, atol=1e-5 * np.abs(want).max())


@needs_torch
def test_check_logits_of_other_weights_or_another_plan_raises():
    cache, (dense, workload) = cases.ModelCache(), tiny_workloads()
    ours = cases.inference_case(workload, cache)
    with pytest.raises(ValueError, match='differ from ours'):
        model_speed.check_logits(ours, cases.baseline_case(dense, torch_evit.EAGER, cache))
    other, params = cases.ModelCache(), jax.device_get(cache.params(workload.config, ''))
    params['blocks'][2]['attn']['qkv']['kernel'] = params['blocks'][2]['attn']['qkv']['kernel'] * 0.9
    other.params = lambda config, run: params
    with pytest.raises(ValueError, match='differ from ours'):
        model_speed.check_logits(ours, cases.baseline_case(workload, torch_evit.EAGER, other))


@needs_torch
def test_measure_against_torch_has_rows_of_all_engines():
    measurement = measure_briefly(tiny_workloads(rates=[0.5]), against=['torch'])
    assert [row['engine'] for row in measurement['rows']] == ['jax', *torch_evit.ENGINES]
    assert measurement['rows'][3]['compile_seconds'] > 0 and measurement['rows'][1]['compile_seconds'] is None
    ours, *others = measurement['rows']
    for row in others:
        ratios = np.divide(row['seconds_per_call'], ours['seconds_per_call'])
        assert row['ours_over_this'] == pytest.approx(np.median(ratios))
    assert model_tables.tables(measurement)[1][0] == ('images/s', 'jax', *torch_evit.ENGINES) and measurement['torch']


@needs_torch
def test_configure_device_that_torch_lacks_raises():
    with pytest.raises(ValueError, match=r'JAX computes on tpu, and torch .* cannot'):
        torch_evit.configure('tpu', threads=1, programs=1)
