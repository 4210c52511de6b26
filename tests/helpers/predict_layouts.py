"""The program that predicts, with the smallest model: python -m tests.helpers.predict_layouts"""

import pytest

from evit_jax import cli, predict
from tests.helpers import layouts

if __name__ == '__main__':
    layouts.prepare(pytest.MonkeyPatch())
    cli.run(predict.main, 'CHECKPOINT', 'IMAGES...')
