"""Rebuilds the weights and images of the cases in tests/golden/families from their names, with numpy only.

The recording uses the same rule; the names are those of the weight file of a case, in any layout.
"""

import math
import re

from tests.helpers.golden_rule import noise

GAINS = {'query and key projections': (r'qkv|in_proj|query|key|[qk]_proj|attn_pool\.q', 1.4),
         'outputs of the branches': (r'fc2|down_proj|attn\.proj|out_proj|o_proj|output\.dense', 0.6)}
TOKENS = r'(cls|dist|reg|class|distillation|register|mask)_(token|embedding)s?$|latent$|probe$'
POSITIONS = r'pos_embed$|position_embeddings?(\.weight)?$'
SCALES = r'gamma(_[12])?$|lambda1$'  # names of LayerScale factors


def make_weights(shapes):
    """Returns PyTorch weights by name, float32.

    Args:
      shapes: shape of each array by its name.
    """
    return {name: _values(f'families/weight/{name}', name, tuple(shape)) for name, shape in shapes.items()}


def make_images(name, size, batch=2):
    """Returns normalised images [B, H, W, 3] of a case.

    Args:
      size: (height, width) in pixels.
    """
    return noise(f'families/image/{name}', (batch, *size, 3))


def _values(tag, name, shape):
    if re.search(POSITIONS, name):
        return noise(tag, shape, 0.5)
    if re.search(TOKENS, name):
        return noise(tag, shape)
    if re.search(SCALES, name):
        return noise(tag, shape, 0.2, 0.6)
    if len(shape) < 2:  # norms have a weight around 1; everything else is a bias
        return noise(tag, shape, 0.1, float(name.endswith('weight')))
    gain = next((gain for pattern, gain in GAINS.values() if re.search(pattern, name)), 1.0)
    return noise(tag, shape, gain / math.sqrt(math.prod(shape[1:])))
