"""Predicts the classes of images: python -m evit_jax.predict runs/digits shots/ more/*.jpg

IMAGES are files, folders (with the images below them), patterns in quotes ('shots/*.png', or '**/*.png'), or -, for
which standard input names a file in each line. Each image becomes a line of the output as soon as it is known; with
--json a JSON object: image, top (label, name, probability) and kept (per reduction the patches that stay, best first;
negative: a fused token) and of a reducer that merges home (per reduction, of each patch the number of the token that it
is in), or image and error. A name that would break the line or is not UTF-8 is shown with escapes (\\n, \\xff); in JSON
a name that is not UTF-8 is also there byte by byte, in image_base64. An image without a prediction, or a picture that
cannot be written, is reported on standard error and ends no other; the exit code is then 1. Code 2 means that nothing
was done.
"""

import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence

from absl import flags, logging

from evit_jax import cli
from evit_jax.checkpoints.loaded import load_model
from evit_jax.data.names import FileNames, in_json, in_one_line, valid_text
from evit_jax.data.progress import Progress
from evit_jax.inference.images import find_images
from evit_jax.inference.predictor import Prediction, Predictor
from evit_jax.reduction.plan_file import read_plan_file
from evit_jax.reduction.registry import list_reducers
from evit_jax.runtime import backend

_TOP = flags.DEFINE_integer('top', 5, 'Guesses of each image.', lower_bound=1)
_JSON = flags.DEFINE_bool('json', False, 'A JSON object in each line.')
_RATE = flags.DEFINE_float('rate', None, 'Share of the tokens that each reduction keeps; as trained if not given.')
_RATES = flags.DEFINE_list('rates', None, 'One for each reduction, as 0.9,0.7,0.5.')
_TOKENS = flags.DEFINE_list('tokens', None, 'Tokens kept at each reduction, as 137,96,67.')
_R = flags.DEFINE_integer('r', None, 'Tokens that every block merges, of a reducer that merges; in place of these.',
                          lower_bound=0)
_PLAN = flags.DEFINE_string('plan', None, 'File of the planner (python -m evit_jax.plan), in place of these.')
_REDUCER = flags.DEFINE_string('reducer', None, 'Method that reduces the tokens; as trained if not given. '
                               f'{", ".join(list_reducers())}.')
_BATCH = flags.DEFINE_integer('batch', 16, 'Images computed at a time.', lower_bound=1)
_EMA = flags.DEFINE_bool('ema', False, 'The moving average of the weights.')
_KEPT = flags.DEFINE_string('kept', None, 'Folder for pictures of what is kept of each image.')


def main(checkpoint: str, *words: str) -> None:
    """Predicts; ends with code 1 where images have no prediction, or no picture."""
    backend.start()
    images = find_images(words, cli.names_on_stdin() if '-' in words else ())
    planned = read_plan_file(_PLAN.value) if _PLAN.value else None
    trained = load_model(checkpoint, ema=_EMA.value).with_reducer(_REDUCER.value).folded()
    plan = trained.plan(rate=_RATE.value, rates=cli.numbers('rates', _RATES.value, float),
                        tokens=cli.numbers('tokens', _TOKENS.value, int), r=_R.value,
                        planned=planned)
    pictures = _Pictures(_KEPT.value, images) if _KEPT.value else None
    logging.info('%s, step %d of %s: %s', trained.name, trained.step, checkpoint, plan)
    predictor = Predictor(trained, batch_size=min(_BATCH.value, len(images)))
    progress, failed, unwritten = Progress('predicting', len(images), 'images'), 0, 0
    for prediction in predictor.stream(images, plan=plan, top=_TOP.value):
        failed += bool(prediction.problem)
        _print(prediction)
        if pictures and not prediction.problem:
            unwritten += not pictures.keep(predictor, prediction)
        progress.add(1)
    if failed:
        logging.warning('%d of %d images could not be read', failed, len(images))
    if unwritten:
        logging.warning('%d pictures could not be written', unwritten)
    if failed or unwritten:
        sys.exit(1)


def _print(prediction: Prediction) -> None:
    name = in_one_line(prediction.name)
    if prediction.problem:
        logging.warning('cannot be %s: %s: %s', 'read' if prediction.image is None else 'predicted', name,
                        prediction.problem)
    if _JSON.value:
        metadata = {'error': valid_text(prediction.problem)} if prediction.problem else {
            'top': [guess._asdict() | {'name': valid_text(guess.name)} for guess in prediction.top],
            'kept': [ids.tolist() for ids in prediction.kept]}
        if prediction.token_of_patch:
            metadata['token_of_patch'] = [index.tolist() for index in prediction.token_of_patch]
        print(json.dumps(in_json(prediction.name) | metadata, allow_nan=False), flush=True)
    elif not prediction.problem:
        guesses = (f'{in_one_line(guess.name)} {100 * guess.probability:.1f} %' for guess in prediction.top)
        print(f'{name}: {", ".join(guesses)}', flush=True)


class _Pictures:
    """A folder with a picture for each image, named after it; none takes the place of an image that is read.

    Args:
      folder: is made.
      images: files that are read.
    """

    def __init__(self, folder: str, images: Sequence[str]):
        self._folder = pathlib.Path(folder).expanduser()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise ValueError(f'--kept={folder} cannot be written ({error.strerror}): give another folder') from error
        self._names = FileNames(self._folder, taken=images)

    def keep(self, predictor: Predictor, prediction: Prediction) -> bool:
        """Writes the picture of a prediction; False where it cannot be written, for the reason in the log."""
        try:
            predictor.draw(prediction).save(self._folder / self._names.of(prediction.name, '_kept.png'))
            return True
        except OSError as error:
            logging.warning('the picture of %s cannot be written: %s', in_one_line(prediction.name),
                            error.strerror or error)
            return False


if __name__ == '__main__':
    cli.run(main, 'CHECKPOINT', 'IMAGES...')
