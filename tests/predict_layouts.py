"""The program that predicts, with the smallest model: python -m tests.predict_layouts"""

import pytest

from evit_jax import commandline, predict
from tests import layouts

if __name__ == '__main__':
    layouts.prepare(pytest.MonkeyPatch())
    commandline.run(predict.main, 'CHECKPOINT', 'IMAGES...')
