"""Records the reference cases of tests/golden/families with PyTorch, timm and transformers.

Run it from the root of the repository, in an environment with torch 2.13, timm 1.0.31, transformers 5.24 and NumPy:

    python -m tests.golden.record          # all files
    python -m tests.golden.record timm_models.json cases.json

A second run writes the same bytes. No test needs these packages.
"""

import json
import logging
import pathlib
import sys

import timm
import torch
import transformers

from tests.golden import record_timm_models

FOLDER = pathlib.Path(__file__).parent / 'families'


def record_timm_table():
    table = record_timm_models.record()
    models = ',\n'.join(f'{json.dumps(name)}: {json.dumps(entry)}' for name, entry in table['models'].items())
    layouts = ',\n'.join(json.dumps(layout) for layout in table['layouts'])
    return (f'{{"format": {json.dumps(table["format"])},\n"versions": {json.dumps(versions())},\n'
            f'"models": {{\n{models}}},\n"layouts": [\n{layouts}]}}\n')


def versions():
    return {module.__name__: module.__version__ for module in (torch, timm, transformers)}


def main(names):
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    if not names or 'timm_models.json' in names:
        (FOLDER / 'timm_models.json').write_text(record_timm_table())


if __name__ == '__main__':
    main(sys.argv[1:])
