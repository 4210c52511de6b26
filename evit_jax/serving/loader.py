"""What the pictures show: python serve.py a.jpg b.png

Needs jax, flatbuffers and Pillow. In Python: Served('.')(images, '0.7')['probabilities'].
"""

import json
import pathlib
import re
import sys

import jax
import jax.export
import numpy as np
from PIL import Image

TURNS = {  # from the orientation of EXIF to what puts the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}


def upright(image):
    """Turns an image by the orientation in its EXIF; where EXIF has none or cannot be read, by that in its XMP."""
    image.load()
    if image.format == 'TIFF':  # Pillow turns it when it loads it
        return image
    try:
        orientation = image.getexif().get(0x112)
    except Exception:  # Pillow raises many kinds for broken EXIF
        orientation = None
    if orientation is None:
        xmp = image.info.get('XML:com.adobe.xmp') or image.info.get('xmp') or b''
        found = re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp.encode() if isinstance(xmp, str) else xmp)
        orientation = int(found[1]) if found else 1
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


class Served:
    """The model in a folder; called with uint8 images [B, size, size, 3] and one of its plans, by default the first."""

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        self.about = json.loads((folder / 'manifest.json').read_text(encoding='utf-8'))
        self.weights = jax.device_put(dict(np.load(folder / self.about['weights'])))
        self.programs = {name: jax.jit(jax.export.deserialize(bytearray((folder / plan['file']).read_bytes())).call)
                         for name, plan in self.about['plans'].items()}

    def __call__(self, images, plan=None):
        return self.programs[plan or next(iter(self.programs))](self.weights, images)

    def read(self, path):
        """An image file as the model is to see it: uint8 [size, size, 3]."""
        size, crop = self.about['image']['size'], self.about['image']['crop']
        image = upright(Image.open(path))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
        image, wide, high = image.convert('RGB'), size, size
        if crop is not None:
            left, top = (max(0, (long - 16 * short) // 2) for long, short in (image.size, image.size[::-1]))
            image = image.crop((left, top, image.width - left, image.height - top))
            wide, high = (int(size / crop) * side // min(image.size) for side in image.size)
        left, top = round((wide - size) / 2), round((high - size) / 2)
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
        return np.asarray(image.crop((left, top, left + size, top + size)))


if __name__ == '__main__':
    model = Served(pathlib.Path(__file__).parent)
    rows = np.asarray(model(np.stack([model.read(path) for path in sys.argv[1:]]))['probabilities'])
    for path, row in zip(sys.argv[1:], rows):
        print(f'{path}: {model.about["class_names"][row.argmax()]} {row.max():.1%}')
