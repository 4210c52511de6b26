"""Predicts the classes of images: python serve.py [--plan=NAME] a.jpg b.png

Needs jax, flatbuffers and Pillow 11.2 or later. In Python: Served('.')(images, '0.7')['probabilities'].
"""

import argparse
import json
import operator
import pathlib
import re
import sys

import jax
import numpy as np
import PIL
from PIL import Image

OLDEST_PILLOW = '11.2'  # an older one does not turn a TIFF by its XMP
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


def check_packages():
    """Raises a RuntimeError where Pillow is too old, or where jax has no backend for the requested platform."""
    here, oldest = ([int(part) for part in version.split('.')[:2]] for version in (PIL.__version__, OLDEST_PILLOW))
    if here < oldest:
        raise RuntimeError(f'Pillow {PIL.__version__} is too old: pip install "Pillow>={OLDEST_PILLOW}"')
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # the first has no text: a platform whose plugin is missing
        reason = str(error) or 'its plugin is not installed'
        raise RuntimeError(f'jax has no backend for JAX_PLATFORMS={jax.config.jax_platforms} ({reason}): set '
                           'JAX_PLATFORMS=cpu, or install what it needs') from error


def read_manifest(file):
    """The manifest, with a check that it has every key that is used here."""
    metadata = json.loads(file.read_text(encoding='utf-8'))
    for part, keys in ((metadata, ('class_names', 'default', 'weights')), (metadata['versions'], ('jax',)),
                       (metadata['image'], ('size', 'crop')), *((plan, ('file', 'trained')) for plan in
                                                             metadata['plans'].values())):
        operator.itemgetter(*keys)(part)  # raises where there is none
    return metadata


def load(file, read):
    """Reads a file of the folder; raises a RuntimeError with the file's name where it is damaged."""
    try:
        return read(file)
    except OSError:
        raise
    except Exception as error:  # numpy raises many kinds for a damaged file
        raise RuntimeError(f'{file} is damaged ({type(error).__name__}: {error}): export the model again') from error


class Served:
    """The model in a folder; called with uint8 images [B, size, size, 3] and one of its plans, or the default one."""

    def __init__(self, folder):
        check_packages()
        folder = pathlib.Path(folder)
        self.metadata = load(folder / 'manifest.json', read_manifest)
        self.weights = jax.device_put(load(folder / self.metadata['weights'], lambda file: dict(np.load(file))))
        self.programs = {name: self.program(folder / plan['file']) for name, plan in self.metadata['plans'].items()}

    def __call__(self, images, plan=None):
        plan = self.metadata['default'] if plan is None else plan
        if plan not in self.programs:
            raise ValueError(f'there is no plan {plan!r}, there are {", ".join(self.programs)}')
        return self.programs[plan](self.weights, images)

    def program(self, file):
        content = bytearray(file.read_bytes())
        try:
            from jax import export  # missing in an old jax
            return jax.jit(export.deserialize(content).call)
        except Exception as error:
            raise RuntimeError(f'{file} cannot be read ({type(error).__name__}: {error}). {self.versions()}') from error

    def versions(self):
        theirs = self.metadata['versions']['jax']
        if theirs == jax.__version__:
            return f'It was written by this version of jax, {theirs}: export the model again'
        return f'It was written by jax {theirs}, this is jax {jax.__version__}: pip install jax=={theirs}'

    def read(self, path):
        """An image file as the model is to see it: uint8 [size, size, 3]."""
        size, crop = self.metadata['image']['size'], self.metadata['image']['crop']
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


def say(text, **how):
    """Prints one line, whatever the names in it hold."""
    print(''.join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text), flush=True, **how)


def main():
    parser = argparse.ArgumentParser(description='Predicts the classes of images.')
    parser.add_argument('images', nargs='+', metavar='IMAGE')
    parser.add_argument('--plan', help='a plan of manifest.json, in place of the default one')
    asked, failed = parser.parse_args(), 0
    try:
        model = Served(pathlib.Path(__file__).parent)
        size, plan = model.metadata['image']['size'], asked.plan or model.metadata['default']
        try:
            model(np.zeros((1, size, size, 3), np.uint8), plan)  # compiles it: what fails here is no image's fault
        except ValueError:
            raise
        except Exception as error:
            raise RuntimeError(f'plan {plan} cannot be run ({error}). {model.versions()}') from error
    except (OSError, RuntimeError, ValueError) as error:
        say(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        sys.exit(2)
    if not model.metadata['plans'][plan]['trained']:
        say(f'plan {plan}, which is not the one of training', file=sys.stderr)
    for path in asked.images:
        try:
            image = model.read(path)
        except Exception as error:  # Pillow raises many kinds for a damaged file
            failed += 1
            say(f'cannot be read: {path}: {error or repr(error)}', file=sys.stderr)
            continue
        row, = np.asarray(model(image[None], plan)['probabilities'])
        if np.isfinite(row).all():
            say(f'{path}: {model.metadata["class_names"][row.argmax()]} {row.max():.1%}')
        else:
            failed += 1
            say(f'cannot be predicted: {path}: its probabilities are not finite', file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='backslashreplace')
    main()
