"""Visualises models: python -m evit_jax.visualize kept runs/digits        page of test images, slider over keep rates
                   python -m evit_jax.visualize kept runs/own shots/*.jpg page of your own images
                   python -m evit_jax.visualize drop runs/digits          accuracy without some patches: plot and CSV
                   python -m evit_jax.visualize tradeoff runs/* speed.json accuracy against MACs and images per second

kept writes one HTML file that a browser can show offline. For each image, the page shows the patches that each
reduction keeps, the class attention, and the weights of the patches in the fused token. If the reducer merges tokens,
the page shows the patches of each token. IMAGES are files, folders, patterns or - (see evit_jax.predict); the default
is images of the test split. If the folder of an image has the name of a class, this is its true class. Unreadable
images are reported, and the exit code is 1.

drop removes patches before the first block: on the object first, off the object first, at random, or by class
attention. It needs masks, in which the object is white. They come from the data, or from the folder --masks, which
holds one mask for each image at the same relative path.

tradeoff reads workdirs of runs (the last evaluation of the training, and evaluate-*.json of other plans), and JSON
files of evit_jax.benchmark model: {"rows": [{"name": ..., "top1": ..., "macs": ..., "images_per_second": ...}, ...]}.
The speed of a row without an accuracy is joined to the evaluations of the same model, image size and plan. If the row
has no plan, it is joined to evaluations with the same MACs. Speeds that match no evaluation are listed, together with
the plans of the evaluations.

CHECKPOINT is a run, a file or folder of weights (.pth, .safetensors, Hugging Face, timm), or hf-hub:ORG/NAME. The
config of the checkpoint, or --config FILE, determines the data.
"""

import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags, logging
from ml_collections import config_flags

from evit_jax import cli
from evit_jax.benchmarks import report
from evit_jax.benchmarks.results import read_results
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.comparison import paper_rows
from evit_jax.data.classes import readable_names
from evit_jax.data.names import FileNames, in_one_line
from evit_jax.data.sources import Source
from evit_jax.data.transforms.decode import decode
from evit_jax.inference.dropping import MaskedSource, Subset, check_masks, drop_patches
from evit_jax.inference.held_out import check_classes, held_out, spread
from evit_jax.inference.images import find_images
from evit_jax.inference.keep_rates import LabelledImage, predict_examples
from evit_jax.inference.model import VisionModel
from evit_jax.interchange.opening import open_model
from evit_jax.reduction.registry import list_reducers
from evit_jax.runtime import backend, storage
from evit_jax.viz.dropping import dropping_csv, dropping_plot
from evit_jax.viz.example import Example, Setting
from evit_jax.viz.report import report_page
from evit_jax.viz.sheet import example_sheet
from evit_jax.viz.tradeoff import tradeoff_plot

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file that names the data; not needed with IMAGES.')
_OUT = flags.DEFINE_string('out', None, 'Output file; default: kept.html, drop.png or tradeoff.png.')
_EMA = flags.DEFINE_bool('ema', False, 'Use the moving average (EMA) of the weights; tradeoff: use its accuracy.')
_BATCH = flags.DEFINE_integer('batch', None, 'Number of images computed at a time; default: 16 for kept, 128 for drop.',
                              lower_bound=1)
_IMAGES = flags.DEFINE_integer('images', None, 'Number of evenly spaced images of the test split; default: 12 for '
                               'kept, all for drop.', lower_bound=1)
_RATES = flags.DEFINE_list('rates', None, 'kept: keep rates of the slider; default: 0.3,0.4,...,1 and the rate used in '
                           'training.')
_SHARES = flags.DEFINE_list('shares', ['0', '0.05', *(f'0.{tenth}' for tenth in range(1, 10))],
                            'drop: fractions of the patches to remove.')
_RATE = flags.DEFINE_float('rate', 1.0, 'drop: keep rate of each reduction in the model.')
_MASKS = flags.DEFINE_string('masks', None, 'drop: folder of masks.')
_SEED = flags.DEFINE_integer('seed', 0, 'drop: seed of the order "at random".')
_REFERENCE = flags.DEFINE_bool('reference', True, 'tradeoff: draw published results of DeiT-S, EViT, DynamicViT and '
                               'LV-ViT.')
_REDUCER = flags.DEFINE_string('reducer', None, 'kept: reducer; default: as in training. One of '
                               f'{", ".join(list_reducers())}.')
_PNG = flags.DEFINE_string('png', None, 'kept: folder for a picture of each image at each keep rate.')


def kept(checkpoint: str, *words: str) -> None:
    """Writes the page of kept patches."""
    backend.start()
    out, pictures = _writable(_OUT.value or 'kept.html', '--out'), _PNG.value and _folder(_PNG.value)
    loaded = open_model(checkpoint, ema=_EMA.value).with_reducer(_REDUCER.value)
    if not loaded.budget.reduce_at:
        raise ValueError(f'the model in {checkpoint} drops nothing at any block (model.reduce_at is empty)')
    images = _images_of_files(words, loaded) if words else _images_of_test_split(checkpoint, loaded)
    rates = _rates(loaded)
    model = VisionModel(loaded, batch_size=min(_BATCH.value or 16, len(images)))
    examples, settings, problems = predict_examples(model, images, rates)
    for problem in problems:
        logging.warning('cannot be read: %s', problem)
    if not examples:
        raise ValueError('none of the images can be read')
    stages = [f'block {block}' for block in sorted(loaded.budget.reduce_at)]
    start = next((number for number, setting in enumerate(settings) if setting.trained and setting.share < 1),
                 len(rates) // 2)
    size, side, ema_note = loaded.image_size, loaded.config.patch_size, ', moving average' if _EMA.value else ''
    verb = 'merges' if loaded.budget.reducer.merges else 'keeps'
    page = report_page(
        examples, settings, patch_size=side, start=start, stages=stages, title=f'What {loaded.name} {verb}',
        metadata=f'{in_one_line(checkpoint)}, step {loaded.step:,}{ema_note}: {_image_count(len(examples))} of '
        f'{size} x {size}, patches of {side} x {side}')
    out.write_text(page, encoding='utf-8')
    print(f'{out}: {_image_count(len(examples))} at {len(rates)} keep rates, {len(page.encode()) / 1e6:.2f} MB')
    num_unwritten = pictures and _write_sheets(pictures, examples, settings, patch_size=side, stages=stages)
    if problems or num_unwritten:
        sys.exit(1)


def _write_sheets(folder: pathlib.Path, examples: Sequence[Example], settings: Sequence[Setting], **options) -> int:
    """Writes a picture of each example under each setting. Returns the number of pictures that could not be written."""
    names, num_unwritten = FileNames(folder), 0
    for number, setting in enumerate(settings):
        for position, example in enumerate(examples, 1):
            name = names.of(f'{position:03d}_{pathlib.PurePath(example.name).name}', f'_{setting.rate}.png')
            try:
                example_sheet(example, number, setting, **options).save(folder / name)
            except OSError as error:
                num_unwritten += 1
                logging.warning('a picture of %s cannot be written: %s', example.name, error.strerror or error)
    return num_unwritten


def drop(checkpoint: str) -> None:
    """Writes accuracy against the fraction of removed patches, as a plot and as a CSV file in the same folder."""
    backend.start()
    out = _writable(_OUT.value or 'drop.png', '--out')
    table = _writable(str(out.with_suffix('.csv')), '--out')
    if table == out:
        raise ValueError(f'--out={_OUT.value} is for the plot: give a name that ends in .png; the table ends in .csv')
    shares = cli.numbers('shares', _SHARES.value, float)
    loaded = open_model(checkpoint, ema=_EMA.value)
    source = _test_split(checkpoint, loaded)
    if _MASKS.value:
        source = MaskedSource(source, _existing_folder(_MASKS.value))
    if _IMAGES.value:
        source = Subset(source, spread(len(source), _IMAGES.value))
    check_masks(source)
    result = drop_patches(loaded, source, shares=shares, rate=_RATE.value, seed=_SEED.value,
                          batch_size=min(_BATCH.value or 128, len(source)))
    dropping_plot(result.shares, result.accuracy, out, on_object=result.on_object,
                  title=f'Top-1 of {loaded.name} without some of its patches, {result.images:,} images')
    table.write_text(dropping_csv(result.shares, result.accuracy))
    rows = [(f'{100 * share:.1f} %', *(f'{100 * values[number]:.1f}' for values in result.accuracy.values()))
            for number, share in enumerate(result.shares)]
    print(report.table(('dropped', *result.accuracy), rows))
    print(f'{result.images:,} images, {100 * result.on_object:.1f} % of their patches on the object: {out}, {table}')


def tradeoff(*files: str) -> None:
    """Writes a plot of accuracy against cost."""
    out = _writable(_OUT.value or 'tradeoff.png', '--out')
    read = read_results(files, ema=_EMA.value)
    results = read.results
    if results and read.unmatched:
        logging.warning('%d speeds are left out, as they belong to no evaluation: %s', len(read.unmatched),
                        read.explain())
    tradeoff_plot(results, out, published=paper_rows.published() if _REFERENCE.value else ())
    print(report.table(('', 'top-1', 'MACs', 'images/s'), [
        (f'{result.series} {result.label}', f'{100 * result.top1:.1f}', f'{result.macs:,.0f}' if result.macs else '',
         f'{result.speed:,.0f}' if result.speed else '') for result in results]))
    print(out)


def _images_of_files(words: Sequence[str], loaded: LoadedModel) -> list[LabelledImage]:
    files, images = find_images(words, cli.names_on_stdin() if '-' in words else ()), []
    for file in files:
        truth, = readable_names((pathlib.Path(file).absolute().parent.name,))
        name = in_one_line(os.path.basename(file))
        images.append(LabelledImage(name, file, truth if truth in loaded.class_names else None))
    return images


def _images_of_test_split(checkpoint: str, loaded: LoadedModel) -> list[LabelledImage]:
    source, images = _test_split(checkpoint, loaded), []
    for index in spread(len(source), _IMAGES.value or 12):
        try:
            example = source[index]
            images.append(LabelledImage(example['id'], decode(example['image']), loaded.class_names[example['label']]))
        except (OSError, ValueError) as error:
            logging.warning('example %d cannot be read: %s', index, error)
    if not images:
        raise ValueError('none of the images tried can be read')
    return images


def _test_split(checkpoint: str, loaded: LoadedModel) -> Source:
    source = held_out(checkpoint, loaded.config.classes, _CONFIG.value and _CONFIG.value.to_dict())
    check_classes(loaded, source)
    return source


def _rates(loaded: LoadedModel) -> list[float]:
    """Returns the ascending keep rates of --rates. The default is 0.3, 0.4, ..., 1 and the rate used in training."""
    if _RATES.value is None:
        trained = {loaded.budget.rate} - {None}
        patches = loaded.config.patches(loaded.image_size)
        least = loaded.budget.reducer.min_kept(patches) / patches
        return sorted(rate for rate in {number / 10 for number in range(3, 11)} | trained if rate >= least)
    return sorted(set(cli.numbers('rates', _RATES.value, float)))


def _image_count(count: int) -> str:
    return f'{count:,} image{"s" * (count != 1)}'


def _writable(name: str, flag: str) -> pathlib.Path:
    """Returns the path of an output file, after creating its folder.

    Raises:
      ValueError: the file cannot be written.
    """
    path = pathlib.Path(name).expanduser()
    _folder(path.parent, flag)
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f'{flag}={name} cannot be written: give another file')
    return path


def _existing_folder(name: str) -> str:
    if not os.path.isdir(os.path.expanduser(name)):
        raise FileNotFoundError(f'there is no folder of masks {name}')
    return name


def _folder(name: str | os.PathLike, flag: str = '--png') -> pathlib.Path:
    folder = pathlib.Path(name).expanduser()
    storage.make_writable(folder, f'{flag}: the folder {folder}', 'give another')
    return folder


PROGRAMS = {'kept CHECKPOINT [IMAGES...]': kept, 'drop CHECKPOINT': drop, 'tradeoff FILES...': tradeoff}

if __name__ == '__main__':
    cli.run(PROGRAMS)
