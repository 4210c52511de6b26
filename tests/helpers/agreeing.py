"""One of several processes that compare values: `python -m tests.helpers.agreeing` prints the outcome of each check."""

import jax
import numpy as np

from evit_jax import cli
from evit_jax.checkpoints import weights
from evit_jax.runtime import agreement, distributed


def refuse(error):
    raise error


def checks(number):
    """Name and check, which all processes go through in this order."""
    return {
        'same': lambda: agreement.check_same({'a': 1, 'long': 'x' * 5000}, 'way out'),
        'value': lambda: agreement.check_same({'a': 1, 'b': 'x' * (1 + 5000 * number), 'c': number}, 'way out'),
        'name': lambda: agreement.check_same({'a': 1} if number else {'a': 1, 'b': 2}, 'way out'),
        'letters': lambda: agreement.check_same({'class 0': 'zoë\udce9' if number else 'zoe'}, 'way out'),
        'decided': lambda: agreement.on_every_process(lambda: number),
        'no file': lambda: agreement.on_every_process(lambda: number and refuse(FileNotFoundError('no folder é'))),
        'no text': lambda: agreement.on_every_process(lambda: None if number else refuse(RuntimeError())),
        'weights': lambda: weights.same_weights('/nowhere', lambda: {'w': np.full(3, number)}),
    }


def main():
    """Goes through all checks."""
    with distributed.distributed():
        for name, check in checks(jax.process_index()).items():
            try:
                print(f'{name}: returned {check()}', flush=True)
            except Exception as error:
                print(f'{name}: {type(error).__name__} {error!s}', flush=True)


if __name__ == '__main__':
    cli.run(main)
