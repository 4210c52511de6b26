"""A page for the browser: what a model keeps, looks at and fuses, with a slider over keep rates. One file, no network.

The page holds each image once; the patches are drawn by the browser (report.js) from their numbers.
"""

import base64
import html
import io
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from evit_jax.viz.example import Example, Setting, Stage, View
from evit_jax.viz.heat import COLOURS

_QUALITY = 92  # of the JPEG that an image is inlined as


def report_page(examples: Sequence[Example], settings: Sequence[Setting], *, patch_size: int, start: int,
                stages: Sequence[str], title: str, metadata: str) -> str:
    """The page as HTML.

    Args:
      examples: each with a view for every setting.
      patch_size: pixels a side.
      start: number of the setting that is shown first.
      stages: what is said of each, as 'block 3'.
      title, about: a heading, and a line below it.

    Raises:
      ValueError: no example.
    """
    if not examples:
        raise ValueError('there is no image to draw')
    data = {
        'patch': patch_size, 'start': start, 'stages': list(stages), 'colours': _text(COLOURS),
        'settings': [setting._asdict() for setting in settings],
        'rows': [_row(example, patch_size) for example in examples]}
    parts = {'title': html.escape(title), 'about': html.escape(metadata), 'style': _part('css'), 'script': _part('js'),
             # The only way out of a script element is its end tag.
             'data': json.dumps(data, separators=(',', ':')).replace('<', '\\u003c')}
    return re.sub(r'\{\{(\w+)\}\}', lambda place: parts[place[1]], _part('html'))


def _row(example: Example, patch_size: int) -> dict[str, Any]:
    height, width = example.image.shape[:2]
    patches, jpeg = height // patch_size * (width // patch_size), io.BytesIO()
    Image.fromarray(example.image).save(jpeg, 'JPEG', quality=_QUALITY, subsampling=0)
    return {'name': example.name, 'truth': example.truth, 'views': [_view(view, patches) for view in example.views],
            'image': f'data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}'}


def _view(view: View, patches: int) -> dict[str, Any]:
    return {'guesses': [[name, round(share, 4)] for name, share in view.guesses], 'right': view.right,
            'stages': [_stage(stage, patches) for stage in view.stages]}


def _stage(stage: Stage, patches: int) -> dict[str, Any]:
    ids = np.array(stage.kept)
    bits = np.zeros(patches, bool)
    bits[ids[ids >= 0] if stage.token_of_patch is None else stage.token_of_patch >= 0] = True
    token_of_patch = {} if stage.token_of_patch is None else {
        'token_of_patch': _text(stage.token_of_patch.astype('<u2'))}  # -1 becomes the largest number
    return {'kept': _text(np.packbits(bits)), 'fused': int((ids < 0).sum())} | token_of_patch | {
        name: _levels(values) for name, values in (('attention', stage.attention), ('origin', stage.origin))
        if values is not None}


def _levels(values: np.ndarray) -> dict[str, Any]:
    """Numbers in 255 steps of the largest; 0 is none at all."""
    values = np.nan_to_num(values)
    peak = float(values.max())
    steps = np.ceil(values / (peak or 1) * 255)  # what is there is not rounded to nothing
    return {'peak': round(peak, 6), 'sum': round(float(values.sum()), 4), 'of': _text(steps.astype(np.uint8))}


def _text(numbers: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(numbers).tobytes()).decode()


def _part(kind: str) -> str:
    return pathlib.Path(__file__).with_name(f'report.{kind}').read_text(encoding='utf-8')
