"""TFRecord files of a tfds data set to array_record, without TensorFlow: python -m evit_jax.convert_data SRC DST

SRC is the folder with dataset_info.json, as ~/tensorflow_datasets/imagenet2012/5.1.0; DST is made. Stopped, and started
again, it goes on where it was. Converting is not needed for training: source 'tfds' reads both.
"""

import argparse
import logging
import os
import sys

import absl.logging

from evit_jax.data import to_array_record


def main() -> None:
    """Runs the program; errors that a user can mend end it with one line and exit code 2."""
    parser = argparse.ArgumentParser(prog='python -m evit_jax.convert_data', description=__doc__.partition(':')[0])
    parser.add_argument('source', metavar='SRC', help='folder with dataset_info.json and TFRecord files')
    parser.add_argument('target', metavar='DST', help='folder to make; array_record files and dataset_info.json')
    arguments = parser.parse_args()
    _print_our_own_lines()
    try:
        to_array_record.convert_to_array_record(arguments.source, arguments.target)
    except (ValueError, OSError) as error:
        print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('stopped; the same command goes on from here', file=sys.stderr)
        sys.exit(130)


def _print_our_own_lines() -> None:
    """The log of this package, not what the libraries have to say."""
    package = os.path.dirname(os.path.abspath(__file__))
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.pathname.startswith(package))
    logging.basicConfig(format='%(message)s', handlers=[handler])
    absl.logging.set_verbosity(absl.logging.INFO)


if __name__ == '__main__':
    main()
