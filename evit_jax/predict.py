r"""Predicts the classes of images: python -m evit_jax.predict runs/digits shots/ more/*.jpg
                                python -m evit_jax.predict hf-hub:ORG/NAME cat.jpg --rate 0.7

CHECKPOINT is the folder of a run or of converted weights, a file or folder of another program (.pth, .safetensors,
Hugging Face, timm), or a model of the Hugging Face Hub: hf-hub:ORG/NAME[@REVISION]. timm/NAME stands for
hf-hub:timm/NAME, unless there is such a path.
IMAGES are files, folders (including their subfolders), patterns in quotes ('shots/*.png' or '**/*.png'), or - to read
file names from standard input, one per line. The program prints one line for each image as soon as it is predicted.

--json prints one JSON object per line. Its keys are
  image           name of the file,
  top             guesses, best first: label, name, probability,
  kept            for each reduction, the ids of the kept patches, best first; a negative id is a fused token,
  token_of_patch  for each reduction, the index of the token that holds each patch; only for a reducer that merges,
  error           reason why the image has no prediction; replaces the keys top, kept and token_of_patch.

Control characters and bytes that are not UTF-8 are printed as escapes (\n, \xff). If a name is not valid UTF-8, the
JSON key image_base64 holds its exact bytes.

If an image cannot be read, or a picture cannot be written, the program reports it on standard error, predicts the other
images, and exits with code 1. Exit code 2 means that no image was predicted.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

from absl import flags, logging

from evit_jax import cli
from evit_jax.data.names import FileNames, in_json, in_one_line, valid_text
from evit_jax.data.progress import Progress
from evit_jax.inference.images import find_images
from evit_jax.inference.model import VisionModel
from evit_jax.inference.prediction import Prediction
from evit_jax.interchange.opening import open_model
from evit_jax.reduction.plan_file import read_plan_file
from evit_jax.reduction.registry import list_reducers
from evit_jax.runtime import backend, storage

_TOP = flags.DEFINE_integer('top', 5, 'Number of guesses for each image.', lower_bound=1)
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object per line.')
_RATE = flags.DEFINE_float('rate', None, 'Fraction of the tokens that each reduction keeps; default: as in training.')
_RATES = flags.DEFINE_list('rates', None, 'One keep rate for each reduction, as 0.9,0.7,0.5.')
_TOKENS = flags.DEFINE_list('tokens', None, 'Number of tokens that each reduction keeps, as 137,96,67.')
_R = flags.DEFINE_string('r', None, 'Number of tokens merged in every block, or the numbers of all blocks with '
                         'hyphens, as 39-31-24; only for a reducer that merges.')
_PLAN = flags.DEFINE_string('plan', None, 'File with a token plan, written by python -m evit_jax.plan.')
_REDUCER = flags.DEFINE_string('reducer', None, 'Reducer; default: as in training. One of '
                               f'{", ".join(list_reducers())}.')
_BATCH = flags.DEFINE_integer('batch', 16, 'Number of images computed at a time.', lower_bound=1)
_EMA = flags.DEFINE_bool('ema', False, 'Use the moving average of the weights.')
_KEPT = flags.DEFINE_string('kept', None, 'Folder for pictures that show each image and its kept patches.')


def main(checkpoint: str, *words: str) -> None:
    """Predicts images. The exit code is 1 if a prediction or a picture is missing."""
    backend.start()
    images = find_images(words, cli.names_on_stdin() if '-' in words else ())
    plan = read_plan_file(_PLAN.value) if _PLAN.value else None
    loaded = open_model(checkpoint, ema=_EMA.value).with_reducer(_REDUCER.value)
    r = cli.merge_counts('r', [_R.value])[0] if _R.value else None
    budget = {'keep_rate': _RATE.value, 'keep_rates': cli.numbers('rates', _RATES.value, float),
              'tokens': cli.numbers('tokens', _TOKENS.value, int), 'r': r, 'plan': plan}
    plan = loaded.plan(**budget)
    pictures = _PictureFolder(_KEPT.value, images) if _KEPT.value else None
    logging.info('%s, step %d of %s: %s', loaded.name, loaded.step, checkpoint, plan)
    model = VisionModel(loaded, batch_size=min(_BATCH.value, len(images))).with_plan(plan=plan)
    progress, num_failed, num_unwritten = Progress('predicting', len(images), 'images'), 0, 0
    for prediction in model.stream(images, top=_TOP.value):
        num_failed += bool(prediction.problem)
        _print(prediction)
        if pictures and not prediction.problem:
            num_unwritten += not pictures.write(model, prediction)
        progress.add(1)
    if num_failed:
        logging.warning('%d of %d images could not be read', num_failed, len(images))
    if num_unwritten:
        logging.warning('%d pictures could not be written', num_unwritten)
    if num_failed or num_unwritten:
        sys.exit(1)


def _print(prediction: Prediction) -> None:
    name = in_one_line(prediction.name)
    if prediction.problem:
        logging.warning('cannot be %s: %s: %s', 'read' if prediction.image is None else 'predicted', name,
                        prediction.problem)
    if _JSON.value:
        print(json.dumps(in_json(prediction.name) | _fields(prediction), allow_nan=False), flush=True)
    elif not prediction.problem:
        guesses = (f'{in_one_line(guess.name)} {100 * guess.probability:.1f} %' for guess in prediction.top)
        print(f'{name}: {", ".join(guesses)}', flush=True)


def _fields(prediction: Prediction) -> dict:
    """Returns the JSON object of a prediction, without the name."""
    if prediction.problem:
        return {'error': valid_text(prediction.problem)}
    fields = {'top': [guess._asdict() | {'name': valid_text(guess.name)} for guess in prediction.top],
              'kept': [ids.tolist() for ids in prediction.kept]}
    if prediction.token_of_patch:
        fields['token_of_patch'] = [index.tolist() for index in prediction.token_of_patch]
    return fields


class _PictureFolder:
    """A folder of pictures that are named after the images. A picture never overwrites an input image."""

    def __init__(self, folder: str, images: Sequence[str]):
        """Creates the folder.

        Args:
          images: paths of the input files.
        """
        self._folder = pathlib.Path(folder).expanduser()
        storage.make_writable(self._folder, f'--kept={folder}', 'give another folder')
        self._names = FileNames(self._folder, taken=images)

    def write(self, model: VisionModel, prediction: Prediction) -> bool:
        """Writes the picture of a prediction. If this fails, logs the error and returns False."""
        try:
            model.draw(prediction).save(self._folder / self._names.of(prediction.name, '_kept.png'))
            return True
        except OSError as error:
            logging.warning('the picture of %s cannot be written: %s', in_one_line(prediction.name),
                            error.strerror or error)
            return False


if __name__ == '__main__':
    cli.run(main, 'CHECKPOINT', 'IMAGES...')
