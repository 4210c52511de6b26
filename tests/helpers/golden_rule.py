"""Rebuilds the weights and images of the reference cases from their names, with numpy only.

The recording used the same rule. `noise` uses the raw PCG64 stream, which is stable across numpy versions, integer
operations and correctly rounded ones, so that the bits are the same on every platform.
"""
import math
import zlib

import numpy as np

GAINS = (("qkv", 1.4), ("attn.proj", 0.6), ("fc2", 0.6), ("patch_embed.conv", 1.4), ("score_predictor", 2.0))


def noise(tag, shape, scale=1.0, shift=0.0):
    """Returns nearly normal float32 values that depend on the tag and the shape alone.

    Each element is the sum of the four little-endian 16-bit parts of a 64-bit word of PCG64(crc32(tag)), in C order,
    normalised to zero mean and unit variance, then scaled and shifted.
    """
    n = math.prod(shape)
    words = np.random.PCG64(zlib.crc32(tag.encode())).random_raw(n).astype("<u8")
    total = words.view("<u2").reshape(n, 4).sum(axis=1, dtype=np.int64)
    unit = (total - 2 * 65535) / math.sqrt((65536 ** 2 - 1) / 3)
    return (unit * scale + shift).astype(np.float32).reshape(shape)


def make_weights(shapes, prefix="golden"):
    """Returns PyTorch weights by name: linear [out, in], convolution OIHW.

    Args:
      shapes: shape of each weight by its key in the state_dict.
    """
    out = {}
    for key, shape in shapes.items():
        shape, tag = tuple(shape), f"{prefix}/weight/{key}"
        norm = len(shapes.get(key.rsplit(".", 1)[0] + ".weight", (0, 0))) == 1
        if key.endswith("num_batches_tracked"):
            out[key] = np.zeros(shape, np.int64)
        elif key.endswith("running_var") or (norm and key.endswith(".weight")):
            out[key] = noise(tag, shape, 0.1, 1.0)      # at least 0.65, since the noise is bounded
        elif len(shape) == 1:
            out[key] = noise(tag, shape, 0.1)           # every bias, running_mean
        elif key in ("cls_token", "pos_embed"):
            out[key] = noise(tag, shape, 1.0 if key == "cls_token" else 0.3)
        else:                                           # linear and convolution: gain / sqrt(fan_in)
            gain = next((g for part, g in GAINS if part in key), 1.0)
            out[key] = noise(tag, shape, gain / math.sqrt(math.prod(shape[1:])))
    return out


def make_images(name, batch, size, prefix="golden"):
    """Returns images [B, 3, size, size]."""
    return noise(f"{prefix}/image/{name}", (batch, 3, size, size))
