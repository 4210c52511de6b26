"""Weights and images for the golden cases, rebuilt from names alone (numpy only).

noise(tag, shape): one PCG64(crc32(tag)) 64-bit word per element, in C order; the word's four
little-endian 16-bit parts are summed, centred and divided by the sum's standard deviation
(zero mean, unit variance, near normal).  Only integer and correctly rounded operations and
the version-stable raw PCG64 stream are used, so the bits are the same on every platform.
"""
import math
import zlib

import numpy as np

GAINS = (("qkv", 1.4), ("attn.proj", 0.6), ("fc2", 0.6), ("patch_embed.conv", 1.4), ("score_predictor", 2.0))


def noise(tag, shape, scale=1.0, shift=0.0):
    n = math.prod(shape)
    words = np.random.PCG64(zlib.crc32(tag.encode())).random_raw(n).astype("<u8")
    total = words.view("<u2").reshape(n, 4).sum(axis=1, dtype=np.int64)
    unit = (total - 2 * 65535) / math.sqrt((65536 ** 2 - 1) / 3)
    return (unit * scale + shift).astype(np.float32).reshape(shape)


def make_weights(shapes, prefix="golden"):
    """shapes: state_dict key -> shape.  Layout is PyTorch's (linear [out, in], conv OIHW)."""
    out = {}
    for key, shape in shapes.items():
        shape, tag = tuple(shape), f"{prefix}/weight/{key}"
        norm = len(shapes.get(key.rsplit(".", 1)[0] + ".weight", (0, 0))) == 1
        if key.endswith("num_batches_tracked"):
            out[key] = np.zeros(shape, np.int64)
        elif key.endswith("running_var") or (norm and key.endswith(".weight")):
            out[key] = noise(tag, shape, 0.1, 1.0)      # at least 0.65: four uniforms are bounded
        elif len(shape) == 1:
            out[key] = noise(tag, shape, 0.1)           # every bias, running_mean
        elif key in ("cls_token", "pos_embed"):
            out[key] = noise(tag, shape, 1.0 if key == "cls_token" else 0.3)
        else:                                           # linear and convolution: gain / sqrt(fan_in)
            gain = next((g for part, g in GAINS if part in key), 1.0)
            out[key] = noise(tag, shape, gain / math.sqrt(math.prod(shape[1:])))
    return out


def make_images(name, batch, size, prefix="golden"):
    return noise(f"{prefix}/image/{name}", (batch, 3, size, size))
