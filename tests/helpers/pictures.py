"""Synthetic images of patches, and the data in HTML pages."""

import json
import re

import numpy as np

PATCH = 4


def make_image(seed=0, side=16):
    """Returns dark noise: 16 patches of 4 x 4 pixels, all darker than a faded patch."""
    return np.random.default_rng(seed).integers(0, 120, (side, side, 3), np.uint8)


def patch_of(image, number, size=PATCH):
    row, column = divmod(number, image.shape[1] // size)
    return image[row * size:(row + 1) * size, column * size:(column + 1) * size]


def data_of(page):
    """Returns the data in an HTML page of `viz.report`."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
