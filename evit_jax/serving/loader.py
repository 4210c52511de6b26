"""What the pictures show: python serve.py a.jpg b.png

Needs jax, flatbuffers and Pillow. In Python: Served('.')(images, '0.7')['probabilities'].
"""

import json
import pathlib
import sys

import jax
import jax.export
import numpy as np
from PIL import Image, ImageOps


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
        image = ImageOps.exif_transpose(Image.open(path))
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
