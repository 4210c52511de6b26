"""Predicts images with an exported model: python serve.py [--plan=NAME] a.jpg b.png

It prints the class of each image; the features, as a JSON list, if the model has no classes. Requires jax, flatbuffers
and Pillow 11.2 or later. Use in Python: Served('.')(images, '0.7')['probabilities'].
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

OLDEST_PILLOW = '11.2'  # older versions ignore the XMP orientation of a TIFF
TRANSPOSE_OF_ORIENTATION = {  # EXIF orientation -> operation that turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}


def upright(image):
    """Turns an image upright. The orientation is read from EXIF, or from XMP if EXIF has none or is damaged."""
    image.load()
    if image.format == 'TIFF':  # load() has already turned it
        return image
    try:
        orientation = image.getexif().get(0x112)
    except Exception:  # Pillow raises exceptions of many types for broken EXIF
        orientation = None
    if orientation is None:
        xmp = image.info.get('XML:com.adobe.xmp') or image.info.get('xmp') or b''
        match = re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp.encode() if isinstance(xmp, str) else xmp)
        orientation = int(match[1]) if match else 1
    return image.transpose(TRANSPOSE_OF_ORIENTATION[orientation]) if orientation in TRANSPOSE_OF_ORIENTATION else image


def check_packages():
    """Raises a RuntimeError if Pillow is too old, or if jax has no backend for the requested platform."""
    installed, oldest = ([int(part) for part in version.split('.')[:2]] for version in (PIL.__version__, OLDEST_PILLOW))
    if installed < oldest:
        raise RuntimeError(f'Pillow {PIL.__version__} is too old: pip install "Pillow>={OLDEST_PILLOW}"')
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # jax raises an AssertionError without text if a plugin is missing
        reason = str(error) or 'its plugin is not installed'
        raise RuntimeError(f'jax has no backend for JAX_PLATFORMS={jax.config.jax_platforms} ({reason}): set '
                           'JAX_PLATFORMS=cpu, or install the packages of that platform') from error


def read_manifest(file):
    """Reads the manifest and checks that it has all keys used in this file."""
    manifest = json.loads(file.read_text(encoding='utf-8'))
    for part, keys in ((manifest, ('class_names', 'default', 'outputs', 'weights')), (manifest['versions'], ('jax',)),
                       (manifest['image'], ('size', 'crop', 'interpolation')),
                       *((plan, ('file', 'trained')) for plan in manifest['plans'].values())):
        operator.itemgetter(*keys)(part)  # raises a KeyError for a missing key
    return manifest


def load(file, read):
    """Returns `read(file)`. Raises a RuntimeError with the name of the file if the file is damaged."""
    try:
        return read(file)
    except OSError:
        raise
    except Exception as error:  # numpy raises exceptions of many types for a damaged file
        raise RuntimeError(f'{file} is damaged ({type(error).__name__}: {error}): export the model again') from error


class Served:
    """The exported model in a folder. Call it with uint8 images [B, H, W, 3], and optionally the name of a plan.

    The call returns a dict with the outputs that the README describes. `manifest['outputs']` has their names; the first
    one is the result of the model: probabilities, embedding or features.
    """

    def __init__(self, folder):
        check_packages()
        folder = pathlib.Path(folder)
        self.manifest = load(folder / 'manifest.json', read_manifest)
        self.weights = jax.device_put(load(folder / self.manifest['weights'], lambda file: dict(np.load(file))))
        self.programs = {name: self.program(folder / plan['file']) for name, plan in self.manifest['plans'].items()}

    def __call__(self, images, plan=None):
        plan = self.manifest['default'] if plan is None else plan
        if plan not in self.programs:
            raise ValueError(f'there is no plan {plan!r}, there are {", ".join(self.programs)}')
        return self.programs[plan](self.weights, images)

    def program(self, file):
        """Reads a StableHLO program and returns it as a jitted function."""
        content = bytearray(file.read_bytes())
        try:
            from jax import export  # does not exist in old versions of jax
            return jax.jit(export.deserialize(content).call)
        except Exception as error:
            raise RuntimeError(f'{file} cannot be read ({type(error).__name__}: {error}). {self.versions()}') from error

    def versions(self):
        """Returns a sentence for error messages, with the versions of jax and the way out."""
        written_by = self.manifest['versions']['jax']
        if written_by == jax.__version__:
            return f'It was written by this version of jax, {written_by}: export the model again'
        return f'It was written by jax {written_by}, this is jax {jax.__version__}: pip install jax=={written_by}'

    def read(self, path):
        """Reads and preprocesses an image file. Returns uint8 [height, width, 3]."""
        (height, width), crop = self.manifest['image']['size'], self.manifest['image']['crop']
        image = upright(Image.open(path))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
        image, resized = image.convert('RGB'), (width, height)
        if crop is not None:
            # Limit the long side to 16 times the short side, as in evaluation, to bound the memory.
            left, top = (max(0, (long - 16 * short) // 2) for long, short in (image.size, image.size[::-1]))
            image = image.crop((left, top, image.width - left, image.height - top))
            high, wide = int(height / crop), int(width / crop)
            if high == wide:
                resized = tuple(high * side // min(image.size) for side in image.size)
            else:
                ratio = min(image.height / high, image.width / wide)
                resized = tuple(round(side / ratio) for side in image.size)
        left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
        image = image.resize(resized, Image.Resampling[self.manifest['image']['interpolation'].upper()])
        return np.asarray(image.crop((left, top, left + width, top + height)))


def print_line(text, **options):
    """Prints text on one line, with control characters escaped."""
    print(''.join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text), flush=True, **options)


def text_of(row, class_names):
    """Returns the likeliest class and its probability; without class names, the values as a JSON list."""
    if class_names:
        return f'{class_names[row.argmax()]} {row.max():.1%}'
    return json.dumps([float(f'{value:.6g}') for value in row])


def open_model(plan):
    """Loads the model in the folder of this file and compiles the plan. Returns (model, name of the plan)."""
    model = Served(pathlib.Path(__file__).parent)
    height, width = model.manifest['image']['size']
    plan = plan or model.manifest['default']
    try:
        model(np.zeros((1, height, width, 3), np.uint8), plan)  # so that an error of the plan is not reported per image
    except ValueError:
        raise
    except Exception as error:
        raise RuntimeError(f'plan {plan} cannot be run ({error}). {model.versions()}') from error
    return model, plan


def main():
    parser = argparse.ArgumentParser(description='Predicts the classes, or the features, of images.')
    parser.add_argument('images', nargs='+', metavar='IMAGE')
    parser.add_argument('--plan', help='name of a plan in manifest.json; if not given, its default plan')
    arguments, failed = parser.parse_args(), 0
    try:
        model, plan = open_model(arguments.plan)
    except (OSError, RuntimeError, ValueError) as error:
        print_line(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        sys.exit(2)
    if not model.manifest['plans'][plan]['trained']:
        print_line(f'plan {plan} is not the plan of training', file=sys.stderr)
    for path in arguments.images:
        try:
            image = model.read(path)
        except Exception as error:  # Pillow raises exceptions of many types for a damaged file
            failed += 1
            print_line(f'cannot be read: {path}: {error or repr(error)}', file=sys.stderr)
            continue
        row, = np.asarray(model(image[None], plan)[model.manifest['outputs'][0]])
        if np.isfinite(row).all():
            print_line(f'{path}: {text_of(row, model.manifest["class_names"])}')
        else:
            failed += 1
            print_line(f'cannot be predicted: {path}: its outputs are not finite', file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='backslashreplace')
    main()
