"""Shows: python -m evit_jax.visualize kept runs/digits            a page of test images, with a slider over keep rates
       python -m evit_jax.visualize kept runs/own shots/*.jpg     of these images
       python -m evit_jax.visualize drop runs/digits              which patches a model can do without, as plot and CSV
       python -m evit_jax.visualize tradeoff runs/* speed.json    accuracy against MACs and images per second

kept: what each stage keeps of an image, where the class token looks, and what the fused token is made of, in one HTML
file that a browser shows offline. IMAGES are files, folders, patterns or - (see evit_jax.predict); without any, images
of the test split are shown. An image's folder is its truth, if it is named as a class. What cannot be read is told, and
in the end by exit code 1.

drop: patches are removed before the first block: on the object first, off it first, anywhere, by class attention. The
data must have masks, or --masks gives a folder with one for each image, at the same place below it: white is object.

tradeoff: FILES are workdirs of runs (of their last evaluation), and JSON with {"rows": [{"name": ..., "top1": ...,
"macs": ..., "images_per_second": ...}, ...]}, as evit_jax.benchmark writes it. A row without an accuracy has that of
the run with the same MACs.

The data are those of the checkpoint's config, or of --config FILE.
"""

import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence

from absl import flags, logging
from ml_collections import config_flags

from evit_jax import commandline
from evit_jax.data.classes import readable
from evit_jax.inference.held_out import held_out, spread
from evit_jax.inference.images import find_images
from evit_jax.inference.looking import Subject, look
from evit_jax.inference.predictor import Predictor
from evit_jax.inference.trained import Trained, read_trained
from evit_jax.pictures.report import report_page
from evit_jax.pictures.sheet import example_sheet

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Whose test split is shown; not needed with IMAGES.')
_OUT = flags.DEFINE_string('out', None, 'File that is written; kept.html, drop.png or tradeoff.png if not given.')
_EMA = flags.DEFINE_bool('ema', False, 'The moving average of the weights; of a run in tradeoff, its accuracy.')
_BATCH = flags.DEFINE_integer('batch', None, 'Images computed at a time; 16 for kept, 128 for drop.', lower_bound=1)
_IMAGES = flags.DEFINE_integer('images', None, 'Of the test split, evenly spread: 12 for kept, all for drop.',
                               lower_bound=1)
_RATES = flags.DEFINE_list('rates', None, 'kept: of the slider; 0.3,0.4,...,1 and the one trained with.')
_PNG = flags.DEFINE_string('png', None, 'kept: folder for a picture of each image at each rate.')


def kept(checkpoint: str, *words: str) -> None:
    """Writes the page."""
    out, pictures = _writable(_OUT.value or 'kept.html', '--out'), _PNG.value and _folder(_PNG.value)
    trained = read_trained(checkpoint, ema=_EMA.value)
    if not trained.reduce_at:
        raise ValueError(f'the model in {checkpoint} drops nothing at any block (model.reduce_at is empty)')
    subjects = _of_files(words, trained) if words else _of_test_split(checkpoint, trained)
    rates = _rates(trained)
    predictor = Predictor(trained, batch_size=min(_BATCH.value or 16, len(subjects)))
    examples, settings, problems = look(predictor, subjects, rates)
    for problem in problems:
        logging.warning('cannot be read: %s', problem)
    stages = [f'block {block}' for block in sorted(trained.reduce_at)]
    start = next((number for number, setting in enumerate(settings) if setting.trained and setting.share < 1),
                 len(rates) // 2)
    page = report_page(
        examples, settings, patch_size=trained.shape.patch_size, start=start, stages=stages,
        title=f'What {trained.name} keeps', about=f'{checkpoint}, step {trained.step:,}'
        f'{", moving average of the weights" if _EMA.value else ""}: {len(examples)} images of {trained.image_size} x '
        f'{trained.image_size}, patches of {trained.shape.patch_size} x {trained.shape.patch_size}')
    out.write_text(page, encoding='utf-8')
    print(f'{out}: {len(examples)} images at {len(rates)} keep rates, {len(page.encode()) / 1e6:.2f} MB')
    for number, setting in enumerate(settings) if pictures else ():
        for place, example in enumerate(examples, 1):
            sheet = example_sheet(example, number, setting, patch_size=trained.shape.patch_size, stages=stages)
            sheet.save(pictures / f'{place:03d}_{pathlib.Path(example.name).stem}_{setting.rate}.png')
    if problems:
        sys.exit(1)


def _of_files(words: Sequence[str], trained: Trained) -> list[Subject]:
    files, subjects = find_images(words, sys.stdin if '-' in words else ()), []
    for file in files:
        truth, = readable((pathlib.Path(file).absolute().parent.name,))
        subjects.append(Subject(os.path.basename(file), file, truth if truth in trained.class_names else None))
    return subjects


def _of_test_split(checkpoint: str, trained: Trained) -> list[Subject]:
    source = held_out(checkpoint, trained.shape.classes, _CONFIG.value and _CONFIG.value.to_dict())
    examples = [source[index] for index in spread(len(source), _IMAGES.value or 12)]
    return [Subject(example['id'], example['image'], trained.class_names[example['label']]) for example in examples]


def _rates(trained: Trained) -> list[float]:
    if _RATES.value is None:
        own = {rate for rate in trained.rates if len(set(trained.rates)) == 1 and not trained.tokens}
        return sorted({number / 10 for number in range(3, 11)} | own)
    return sorted(set(_numbers('rates', _RATES.value)))


def _numbers(flag: str, texts: Sequence[str]) -> list[float]:
    try:
        return [float(text) for text in texts]
    except ValueError:
        raise ValueError(f'--{flag}={",".join(texts)} is no list of numbers: give them with commas between') from None


def _writable(name: str, flag: str) -> pathlib.Path:
    """The path of a file that can be written; its folder is made.

    Raises:
      ValueError: it cannot.
    """
    path = pathlib.Path(name).expanduser()
    _folder(path.parent, flag)
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f'{flag}={name} cannot be written: give another file')
    return path


def _folder(name: str | os.PathLike, flag: str = '--png') -> pathlib.Path:
    folder = pathlib.Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(f'{flag}: the folder {folder} cannot be written ({error.strerror}): give another') from error


if __name__ == '__main__':
    commandline.run({'kept CHECKPOINT [IMAGES...]': kept})
