"""Records tests/golden/token_reduction with public PyTorch modules of ATS, SiT, PatchMerger and Sinkhorn.

Run it from the root of the repository, in an environment with torch 2.13 and NumPy, with checkouts of
JoakimHaurum/TokenReduction and adaptivetokensampling/ATS:

    python -m tests.golden.record_token_reduction TOKEN_REDUCTION ATS

A second run writes the same bytes. No test needs torch or the checkouts. Inputs and parameters are random and stored.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys
import types
from unittest import mock

import numpy as np
import torch

FOLDER = pathlib.Path(__file__).parent / 'token_reduction'
BATCH, N, WIDTH, HEADS = 3, 16, 8, 2
COUNTS = (5, 12)          # counts of kept tokens of the learned modules
SAMPLE_COUNTS = (12, 5)   # sample counts of two successive reductions of ATS
FORMAT = {
    'learned': 'NAME_K.npz: x [B, N, D] goes through the module of NAME with K outputs. param/KEY is its state_dict, '
               'output [B, K, D] and weights [B, K, N] its results. grad/x and grad/KEY are the gradients of '
               'sum(output * cotangent).',
    'ats': 'ats_S.npz: reduction S. x [B, 1 + N, D] goes through ATSAttention with param/KEY; mask [B, 1 + N] is '
           'False for padding. ids [B, K], new_mask [B, K] and output [B, K, D] are its results: class token first, '
           'padding has id 0. steps [B, S, 1] and cdf [B, N, 1] are the arguments of its torch.cdist, nearest [B, S] '
           'is the result of its torch.argmin. The x of reduction 1 is x + output of reduction 0, at its ids.',
    'ats_scores': 'class_attention [B, 1, 1 + N] and values [B, 1, 1 + N, D] of one head go through '
                  'score_assignment_step of adaptivetokensampling/ATS; scores [B, N] are its results, in the order of '
                  'the tokens.',
    'float64': 'largest difference of a result to a run in float64, relative to its largest value if that is above 1',
}


def main(token_reduction, ats):
    stub_timm()
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False
    FOLDER.mkdir(exist_ok=True)
    modules = {name: load(token_reduction / f'models/{name}.py') for name in ('ats', 'sit', 'patchmerger', 'sinkhorn')}
    files = {}
    for keep in COUNTS:
        files |= {f'{name}_{keep}': record_learned(name, modules[name], keep) for name in modules if name != 'ats'}
    files |= record_ats(modules['ats'])
    files |= record_scores(load_sampler(ats))
    largest = {}
    for name, (arrays, exact) in files.items():
        np.savez(FOLDER / f'{name}.npz', **arrays)
        largest[name] = float(f'{max(relative(arrays[key], value) for key, value in exact.items()):.1e}')
    sources = {'JoakimHaurum/TokenReduction': commit(token_reduction), 'adaptivetokensampling/ATS': commit(ats)}
    manifest = {'format': FORMAT, 'commits': sources, 'torch': torch.__version__, 'heads': HEADS, 'float64': largest}
    (FOLDER / 'cases.json').write_text(json.dumps(manifest, indent=1) + '\n')
    print(json.dumps(largest, indent=1))


def record_learned(name, source, keep):
    make = {'sit': lambda: source.TokenSlimmingModule(WIDTH, keep),
            'patchmerger': lambda: source.PatchMerger(WIDTH, keep),
            'sinkhorn': lambda: source.Sinkhorn(WIDTH, keep, eps=1.0, iters=3)}[name]
    rng = np.random.default_rng([ord(name[0]), ord(name[1]), keep])
    x, cotangent = rng.normal(size=(BATCH, N, WIDTH)), rng.normal(size=(BATCH, keep, WIDTH))
    params = {key: rng.normal(size=value.shape) * 0.5 + (0.5 if key == 'scale' else 0)
              for key, value in make().state_dict().items()}

    def run(dtype):
        module, input = make().to(dtype), torch.tensor(x, dtype=torch.float32).to(dtype).requires_grad_()
        module.load_state_dict({key: torch.tensor(value, dtype=torch.float32) for key, value in params.items()})
        output, weights = module(input)
        (output * torch.tensor(cotangent, dtype=torch.float32).to(dtype)).sum().backward()
        return {'output': output, 'weights': weights, 'grad/x': input.grad} | {
            f'grad/{key}': value.grad for key, value in module.named_parameters()}

    inputs = {'x': x, 'cotangent': cotangent} | {f'param/{key}': value for key, value in params.items()}
    return as_float32(inputs) | to_numpy(run(torch.float32)), to_numpy(run(torch.float64))


def record_ats(source):
    rng, files = np.random.default_rng(0), {}
    x, mask = rng.normal(size=(BATCH, 1 + N, WIDTH)).astype(np.float32), np.ones((BATCH, 1 + N), bool)
    for stage, count in enumerate(SAMPLE_COUNTS):
        shapes = {key: value.shape for key, value in ats_module(source, count).state_dict().items()}
        params = as_float32({key: rng.normal(size=shape) * 0.4 for key, shape in shapes.items()})
        results, exact = (run_ats(source, count, params, x, mask, dtype) for dtype in (torch.float32, torch.float64))
        for key in ('ids', 'new_mask', 'nearest'):
            np.testing.assert_array_equal(results[key], exact.pop(key))
        inputs = {'x': x, 'mask': mask} | {f'param/{key}': value for key, value in params.items()}
        files[f'ats_{stage}'] = inputs | results, exact
        x = np.take_along_axis(x, results['ids'][..., None], axis=1) + results['output']
        mask = results['new_mask']
    return files


def ats_module(source, count):
    return source.ATSAttention(WIDTH, HEADS, qkv_bias=True, ats_sample_count=count)


def run_ats(source, count, params, x, mask, dtype):
    module = ats_module(source, count).to(dtype)
    module.ats.sample_steps = module.ats.sample_steps.to(dtype)
    module.load_state_dict({key: torch.from_numpy(value) for key, value in params.items()})
    with (mock.patch.object(torch, 'cdist', wraps=torch.cdist) as cdist,
          mock.patch.object(torch, 'argmin', wraps=torch.argmin) as argmin, torch.inference_mode()):
        output, new_mask, ids = module(torch.from_numpy(x).to(dtype), torch.from_numpy(mask))
        nearest = argmin(*argmin.call_args.args, **argmin.call_args.kwargs)
    steps, cdf = cdist.call_args.args
    return to_numpy({'output': output, 'new_mask': new_mask, 'ids': ids, 'steps': steps, 'cdf': cdf,
                     'nearest': nearest})


def record_scores(sampler):
    rng = np.random.default_rng(1)
    attention = rng.dirichlet(np.full(1 + N, 0.5), (BATCH, 1)).astype(np.float32)
    values = rng.normal(size=(BATCH, 1, 1 + N, WIDTH)).astype(np.float32)

    def run(dtype):
        rows = torch.from_numpy(attention)[:, :, None].expand(-1, -1, 1 + N, -1)  # it reads the first row alone
        shares, order = sampler.score_assignment_step(rows.to(dtype), torch.from_numpy(values).to(dtype))
        return to_numpy({'scores': torch.zeros_like(shares).scatter(1, order, shares)})

    arrays = {'class_attention': attention, 'values': values}
    return {'ats_scores': (arrays | run(torch.float32), run(torch.float64))}


def stub_timm():
    """Installs the names that the sources import from timm for their full models, which are not run here."""
    for name in ('timm', 'timm.data', 'timm.models', 'timm.models.layers', 'timm.models.vision_transformer'):
        sys.modules[name] = types.ModuleType(name)
    for name in ('PatchEmbed', 'Mlp', 'DropPath'):
        setattr(sys.modules['timm.models.layers'], name, torch.nn.Identity)
    sys.modules['timm.models.vision_transformer'].VisionTransformer = torch.nn.Module
    sys.modules['timm.data'].IMAGENET_DEFAULT_MEAN = sys.modules['timm.data'].IMAGENET_DEFAULT_STD = ()


def load(path, name='source'):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_sampler(checkout):
    """Loads the class without its package, whose other modules need more libraries."""
    package = types.ModuleType('source_package')
    package.__path__ = [str(checkout / 'libs/models/transformers')]
    sys.modules['source_package'] = package
    return load(checkout / 'libs/models/transformers/ats_block.py', 'source_package.ats_block').AdaptiveTokenSampler


def commit(checkout):
    return subprocess.check_output(['git', '-C', checkout, 'rev-parse', 'HEAD'], text=True).strip()


def as_float32(arrays):
    return {key: np.asarray(value, np.float32) for key, value in arrays.items()}


def to_numpy(tensors):
    return {key: value.detach().numpy() for key, value in tensors.items()}


def relative(value, exact):
    return np.abs(value - exact).max() / max(np.abs(exact).max(), 1)


if __name__ == '__main__':
    main(*map(pathlib.Path, sys.argv[1:]))
