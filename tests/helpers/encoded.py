"""Encodes images, and damages encoded images."""

import io

import numpy as np
import simplejpeg
from PIL import Image

from tests.helpers.recipe_rule import make_image

WIDTH, HEIGHT = 50, 40
IMAGE = make_image(WIDTH, HEIGHT)
PICTURE = Image.fromarray(IMAGE)


def encoded(picture, form, **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


JPEGS = {
    'baseline': encoded(PICTURE, 'JPEG', quality=90),
    'full colour': encoded(PICTURE, 'JPEG', subsampling=0),
    'progressive': encoded(PICTURE, 'JPEG', progressive=True),
    'restarts': encoded(PICTURE, 'JPEG', restart_marker_rows=1),
    'grey': encoded(PICTURE.convert('L'), 'JPEG'),
    'cmyk': encoded(PICTURE.convert('CMYK'), 'JPEG'),
    'ycck': simplejpeg.encode_jpeg(~np.array(PICTURE.convert('CMYK')), 90, 'CMYK', '420'),
}


def corrupted(rng, file):
    """Returns the file with bits flipped, truncated, or with bytes inserted or removed."""
    at, length = (int(rng.integers(1, high)) for high in (len(file), 60))
    match rng.integers(4):
        case 0:
            flipped = bytearray(file)
            for place in rng.integers(len(file), size=rng.integers(1, 9)):
                flipped[place] ^= 1 << rng.integers(8)
            return bytes(flipped)
        case 1:
            return file[:at]
        case 2:
            return file[:at] + rng.bytes(length) + file[at:]
        case _:
            return file[:at] + file[at + length:]


def grey_png(width, height, level=128):
    """Returns a PNG file of one grey level."""
    return encoded(Image.new('RGB', (width, height), (level,) * 3), 'PNG')
