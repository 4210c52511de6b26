"""Shows: python -m evit_jax.visualize kept runs/digits            a page of test images, with a slider over keep rates
       python -m evit_jax.visualize kept runs/own shots/*.jpg     of these images
       python -m evit_jax.visualize drop runs/digits              which patches a model can do without, as plot and CSV
       python -m evit_jax.visualize tradeoff runs/* speed.json    accuracy against MACs and images per second

kept: what each stage keeps of an image, where the class token looks, and what the fused token is made of, in one HTML
file that a browser shows offline; of a reducer that merges, the patches of each token. IMAGES are files, folders,
patterns or - (see evit_jax.predict); without any, images of the test split are shown. An image's folder is its truth,
if it is named as a class. What cannot be read is told, and in the end by exit code 1.

drop: patches are removed before the first block: on the object first, off it first, anywhere, by class attention. The
data must have masks, or --masks gives a folder with one for each image, at the same place below it: white is object.

tradeoff: FILES are workdirs of runs (their last evaluation, and their evaluate-*.json of other plans), and JSON with
{"rows": [{"name": ..., "top1": ..., "macs": ..., "images_per_second": ...}, ...]}, as evit_jax.benchmark model writes
it. A row without an accuracy gives its speed to the evaluations of the same model, image size and plan; a row without a
plan, to those with the same MACs. Speeds that belong to no evaluation are listed, with the plans of both sides.

The data are those of the checkpoint's config, or of --config FILE.
"""

import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence

from absl import flags, logging
from ml_collections import config_flags

from evit_jax import cli
from evit_jax.benchmarks import report
from evit_jax.benchmarks.results import read_results
from evit_jax.checkpoints.loaded import LoadedModel, load_model
from evit_jax.data.classes import readable_names
from evit_jax.data.names import FileNames, in_one_line
from evit_jax.data.sources import Source
from evit_jax.data.transforms.decode import decode
from evit_jax.inference.dropping import Masked, Some, check_masks, drop_patches
from evit_jax.inference.held_out import check_classes, held_out, spread
from evit_jax.inference.images import find_images
from evit_jax.inference.looking import Subject, look
from evit_jax.inference.predictor import Predictor
from evit_jax.reduction.registry import list_reducers
from evit_jax.runtime import backend
from evit_jax.viz.dropping import dropping_csv, dropping_plot
from evit_jax.viz.example import Example, Setting
from evit_jax.viz.report import report_page
from evit_jax.viz.sheet import example_sheet
from evit_jax.viz.tradeoff import PUBLISHED, tradeoff_plot

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Whose test split is shown; not needed with IMAGES.')
_OUT = flags.DEFINE_string('out', None, 'File that is written; kept.html, drop.png or tradeoff.png if not given.')
_EMA = flags.DEFINE_bool('ema', False, 'The moving average of the weights; of a run in tradeoff, its accuracy.')
_BATCH = flags.DEFINE_integer('batch', None, 'Images computed at a time; 16 for kept, 128 for drop.', lower_bound=1)
_IMAGES = flags.DEFINE_integer('images', None, 'Of the test split, evenly spread: 12 for kept, all for drop.',
                               lower_bound=1)
_RATES = flags.DEFINE_list('rates', None, 'kept: of the slider; 0.3,0.4,...,1 and the one trained with.')
_SHARES = flags.DEFINE_list('shares', ['0', '0.05', *(f'0.{tenth}' for tenth in range(1, 10))], 'drop: of the patches.')
_RATE = flags.DEFINE_float('rate', 1.0, 'drop: kept by each reduction of the patches that the model gets.')
_MASKS = flags.DEFINE_string('masks', None, 'drop: folder of masks.')
_SEED = flags.DEFINE_integer('seed', 0, 'drop: of what is dropped at random.')
_REFERENCE = flags.DEFINE_bool('reference', True, 'tradeoff: published figures of DeiT-S, EViT, DynamicViT, LV-ViT.')
_REDUCER = flags.DEFINE_string('reducer', None, 'kept: method that reduces the tokens; as trained if not given. '
                               f'{", ".join(list_reducers())}.')
_PNG = flags.DEFINE_string('png', None, 'kept: folder for a picture of each image at each rate.')


def kept(checkpoint: str, *words: str) -> None:
    """Writes the page."""
    backend.start()
    out, pictures = _writable(_OUT.value or 'kept.html', '--out'), _PNG.value and _folder(_PNG.value)
    trained = load_model(checkpoint, ema=_EMA.value).with_reducer(_REDUCER.value)
    if not trained.budget.reduce_at:
        raise ValueError(f'the model in {checkpoint} drops nothing at any block (model.reduce_at is empty)')
    subjects = _of_files(words, trained) if words else _of_test_split(checkpoint, trained)
    rates = _rates(trained)
    predictor = Predictor(trained, batch_size=min(_BATCH.value or 16, len(subjects)))
    examples, settings, problems = look(predictor, subjects, rates)
    for problem in problems:
        logging.warning('cannot be read: %s', problem)
    if not examples:
        raise ValueError('none of the images can be read')
    stages = [f'block {block}' for block in sorted(trained.budget.reduce_at)]
    start = next((number for number, setting in enumerate(settings) if setting.trained and setting.share < 1),
                 len(rates) // 2)
    size, side, average = trained.image_size, trained.config.patch_size, ', moving average' if _EMA.value else ''
    does = 'merges' if trained.budget.reducer.merges else 'keeps'
    page = report_page(
        examples, settings, patch_size=side, start=start, stages=stages, title=f'What {trained.name} {does}',
        metadata=f'{in_one_line(checkpoint)}, step {trained.step:,}{average}: {_images(len(examples))} of {size} x '
        f'{size}, patches of {side} x {side}')
    out.write_text(page, encoding='utf-8')
    print(f'{out}: {_images(len(examples))} at {len(rates)} keep rates, {len(page.encode()) / 1e6:.2f} MB')
    unwritten = pictures and _write_sheets(pictures, examples, settings, patch_size=side, stages=stages)
    if problems or unwritten:
        sys.exit(1)


def _write_sheets(folder: pathlib.Path, examples: Sequence[Example], settings: Sequence[Setting], **how) -> int:
    """Writes a picture of each example under each setting; returns how many could not be written."""
    names, unwritten = FileNames(folder), 0
    for number, setting in enumerate(settings):
        for place, example in enumerate(examples, 1):
            name = names.of(f'{place:03d}_{pathlib.PurePath(example.name).name}', f'_{setting.rate}.png')
            try:
                example_sheet(example, number, setting, **how).save(folder / name)
            except OSError as error:
                unwritten += 1
                logging.warning('a picture of %s cannot be written: %s', example.name, error.strerror or error)
    return unwritten


def drop(checkpoint: str) -> None:
    """Writes accuracy against the share of the patches dropped, as a plot and beside it as CSV."""
    backend.start()
    out = _writable(_OUT.value or 'drop.png', '--out')
    table = _writable(str(out.with_suffix('.csv')), '--out')
    if table == out:
        raise ValueError(f'--out={_OUT.value} is for the plot: give a name that ends in .png, the table lies beside it')
    shares = cli.numbers('shares', _SHARES.value, float)
    trained = load_model(checkpoint, ema=_EMA.value)
    source = _test_split(checkpoint, trained)
    if _MASKS.value:
        source = Masked(source, _folder_there(_MASKS.value))
    if _IMAGES.value:
        source = Some(source, spread(len(source), _IMAGES.value))
    check_masks(source)
    found = drop_patches(trained, source, shares=shares, rate=_RATE.value, seed=_SEED.value,
                         batch_size=min(_BATCH.value or 128, len(source)))
    dropping_plot(found.shares, found.accuracy, out, on_object=found.on_object,
                  title=f'Top-1 of {trained.name} without some of its patches, {found.images:,} images')
    table.write_text(dropping_csv(found.shares, found.accuracy))
    rows = [(f'{100 * share:.1f} %', *(f'{100 * values[number]:.1f}' for values in found.accuracy.values()))
            for number, share in enumerate(found.shares)]
    print(report.table(('dropped', *found.accuracy), rows))
    print(f'{found.images:,} images, {100 * found.on_object:.1f} % of their patches on the object: {out}, {table}')


def tradeoff(*files: str) -> None:
    """Writes the plot of accuracy against cost."""
    out = _writable(_OUT.value or 'tradeoff.png', '--out')
    read = read_results(files, ema=_EMA.value)
    results = read.results
    if results and read.unmatched:
        logging.warning('%d speeds are left out, as they belong to no evaluation: %s', len(read.unmatched),
                        read.explain())
    tradeoff_plot(results, out, published=PUBLISHED if _REFERENCE.value else ())
    print(report.table(('', 'top-1', 'MACs', 'images/s'), [
        (f'{result.series} {result.label}', f'{100 * result.top1:.1f}', f'{result.macs:,.0f}' if result.macs else '',
         f'{result.speed:,.0f}' if result.speed else '') for result in results]))
    print(out)


def _of_files(words: Sequence[str], trained: LoadedModel) -> list[Subject]:
    files, subjects = find_images(words, cli.names_on_stdin() if '-' in words else ()), []
    for file in files:
        truth, = readable_names((pathlib.Path(file).absolute().parent.name,))
        name = in_one_line(os.path.basename(file))
        subjects.append(Subject(name, file, truth if truth in trained.class_names else None))
    return subjects


def _of_test_split(checkpoint: str, trained: LoadedModel) -> list[Subject]:
    source, subjects = _test_split(checkpoint, trained), []
    for index in spread(len(source), _IMAGES.value or 12):
        try:
            example = source[index]
            subjects.append(Subject(example['id'], decode(example['image']), trained.class_names[example['label']]))
        except (OSError, ValueError) as error:
            logging.warning('example %d cannot be read: %s', index, error)
    if not subjects:
        raise ValueError('none of the images tried can be read')
    return subjects


def _test_split(checkpoint: str, trained: LoadedModel) -> Source:
    source = held_out(checkpoint, trained.config.classes, _CONFIG.value and _CONFIG.value.to_dict())
    check_classes(trained, source)
    return source


def _rates(trained: LoadedModel) -> list[float]:
    if _RATES.value is None:
        own = {trained.budget.rate} - {None}
        patches = trained.config.patches(trained.image_size)
        least = trained.budget.reducer.min_kept(patches) / patches
        return sorted(rate for rate in {number / 10 for number in range(3, 11)} | own if rate >= least)
    return sorted(set(cli.numbers('rates', _RATES.value, float)))


def _images(count: int) -> str:
    return f'{count:,} image{"s" * (count != 1)}'


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


def _folder_there(name: str) -> str:
    if not os.path.isdir(os.path.expanduser(name)):
        raise FileNotFoundError(f'there is no folder of masks {name}')
    return name


def _folder(name: str | os.PathLike, flag: str = '--png') -> pathlib.Path:
    folder = pathlib.Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(f'{flag}: the folder {folder} cannot be written ({error.strerror}): give another') from error


PROGRAMS = {'kept CHECKPOINT [IMAGES...]': kept, 'drop CHECKPOINT': drop, 'tradeoff FILES...': tradeoff}

if __name__ == '__main__':
    cli.run(PROGRAMS)
