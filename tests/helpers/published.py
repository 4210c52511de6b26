"""Files of a pretrained model as on the Hugging Face Hub, with random weights."""

import functools
import json
import pathlib
import tempfile

import evit_jax
from evit_jax.interchange import safetensors_file, torch_weights

NAME = 'vit_digits'  # a named model, which the converter detects
CLASSES = tuple(f'class {label}' for label in range(10))


@functools.cache
def model(seed=0):
    """The model of the files, with all tokens."""
    return evit_jax.create_model(NAME, keep_rate=1.0, num_classes=10, class_names=CLASSES, seed=seed)


@functools.cache
def files(seed=0):
    """Returns file name -> content, in timm's layout."""
    published = model(seed)
    heads = {'num_heads': published.config.heads, 'norm_eps': published.config.norm_epsilon, 'act_layer': 'gelu'}
    config = {'architecture': NAME, 'num_classes': 10, 'global_pool': 'token', 'model_args': heads,
              'label_names': CLASSES, 'pretrained_cfg': {'mean': [0.5] * 3, 'std': [0.25] * 3, 'crop_pct': 1.0}}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / 'model.safetensors'
        safetensors_file.write(path, torch_weights.to_torch(published.params, published.config), {})
        return {'model.safetensors': path.read_bytes(), 'config.json': json.dumps(config).encode()}
