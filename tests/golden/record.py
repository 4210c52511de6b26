"""Records the reference cases of tests/golden/families with PyTorch, timm and transformers.

Run it from the root of the repository, in an environment with torch 2.13, timm 1.0.31, transformers 5.24 and NumPy:

    python -m tests.golden.record                    # all files
    python -m tests.golden.record dinov3 hf_clip     # only these cases
    python -m tests.golden.record timm_models.json   # only the table of timm's models

A second run writes the same bytes. No test needs these packages. Weights and images are not stored: both the recording
and the tests rebuild them by `tests.helpers.family_rule`.
"""

import json
import logging
import pathlib
import sys

import numpy as np
import timm
import torch
import transformers

from tests.golden import record_hugging_face, record_timm, record_timm_models
from tests.helpers import family_rule

FOLDER = pathlib.Path(__file__).parent / 'families'
FORMAT = (
    'cases: name -> case. configs: file name -> content. arrays: name in model.safetensors -> shape. unused: arrays '
    'that the outputs do not depend on. sizes: (height, width) of the images; the first is native. float64: largest '
    'difference of an output to a run in float64, relative to its largest value. other_names: layout -> {name: saved '
    'name, or [saved name, first row, row after the last]}. config: fields of the ViTConfig, as in timm_models.json; '
    'null for transformers. NAME.npz has OUTPUT_HxW for the outputs features (input of the head), logits (unless they '
    'are the features) and patch_tokens (after the last norm, first image only).')


def main(names):
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False
    if not names or 'timm_models.json' in names:
        (FOLDER / 'timm_models.json').write_text(table_of_timm())
    all_cases = [*record_timm.CASES, *record_hugging_face.CASES]
    path = FOLDER / 'cases.json'
    entries = json.loads(path.read_text())['cases'] if names else {}
    entries |= {name: record_case(name) for name in all_cases if not names or name in names}
    cases = ',\n'.join(f'{json.dumps(name)}: {json.dumps(entries[name])}' for name in all_cases)
    path.write_text(f'{{{head(FORMAT)},\n"cases": {{\n{cases}}}}}\n')


def record_case(name):
    """Records the outputs of a case in its .npz file. Returns its entry in cases.json."""
    source = record_timm if name in record_timm.CASES else record_hugging_face
    case, load, run = source.record(name)
    weights = family_rule.make_weights(case.arrays)
    model = load({key: torch.from_numpy(value) for key, value in weights.items()})
    others = record_hugging_face.other_names(case, weights, model) if source is record_hugging_face else {}
    images = {size: family_rule.make_images(name, size).transpose(0, 3, 1, 2) for size in case.sizes}
    outputs = {size: compute(run, model, value) for size, value in images.items()}
    exact = {size: compute(run, model.double(), value.astype(np.float64)) for size, value in images.items()}
    distance = max(relative(outputs[size][key], exact[size][key]) for size in images for key in outputs[size])
    stored = {f'{key}_{height}x{width}': value[:1] if key == 'patch_tokens' else value
              for (height, width), values in outputs.items() for key, value in values.items()
              if key != 'logits' or not np.array_equal(value, values['features'])}
    np.savez(FOLDER / f'{name}.npz', **stored)
    print(f'{name}: float64 {distance:.1e}, features {outputs[case.sizes[0]]["features"].std():.2f}')
    return {'configs': case.configs, 'arrays': case.arrays, 'unused': case.unused, 'sizes': case.sizes,
            'float64': float(f'{distance:.1e}'), 'other_names': others, 'config': case.config}


def compute(run, model, images):
    with torch.inference_mode():
        return {key: value.numpy() for key, value in run(model, torch.from_numpy(images)).items()}


def relative(value, exact):
    return np.abs(value - exact).max() / np.abs(exact).max()


def table_of_timm():
    table = record_timm_models.record()
    models = ',\n'.join(f'{json.dumps(name)}: {json.dumps(entry)}' for name, entry in table['models'].items())
    layouts = ',\n'.join(json.dumps(layout) for layout in table['layouts'])
    return f'{{{head(record_timm_models.FORMAT)},\n"models": {{\n{models}}},\n"layouts": [\n{layouts}]}}\n'


def head(text):
    versions = {module.__name__: module.__version__ for module in (torch, timm, transformers)}
    return f'"format": {json.dumps(text)},\n"versions": {json.dumps(versions)}'


if __name__ == '__main__':
    main(sys.argv[1:])
