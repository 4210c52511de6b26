"""Creates an HTML page of images: kept tokens, class attention and fused token, with a slider of keep rates.

The page is one self-contained file. It holds each image once; patches.js draws patches by their ids.
"""

import base64
import html
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from evit_jax.viz.example import Example, ReductionView, Setting
from evit_jax.viz.patches import HEAT_COLOURS, grid, has_merged, patch_groups
from evit_jax.viz.templates import fill_page, jpeg_url, read_part

_JPEG_QUALITY = 92  # quality of the images in the page


def report_page(examples: Sequence[Example], settings: Sequence[Setting], *, patch_size: int, start: int,
                stages: Sequence[str], title: str, metadata: str) -> str:
    """Returns the page as HTML.

    Args:
      examples: examples with a view for every setting.
      patch_size: side of a patch in pixels.
      start: index of the setting that is shown first.
      stages: a name for each stage, for example 'block 3'.
      title, metadata: heading, and the line of text below it.

    Raises:
      ValueError: there is no example.
    """
    if not examples:
        raise ValueError('there is no image to draw')
    merged = any(has_merged(_groups(example, stage, patch_size))
                 for example in examples for view in example.views for stage in view.stages)
    data = {
        'patch': patch_size, 'start': start, 'stages': list(stages), 'colours': _base64(HEAT_COLOURS),
        'settings': [setting._asdict() for setting in settings],
        'rows': [_row(example, patch_size, merged) for example in examples]}
    parts = {'metadata': html.escape(metadata), 'script': read_part('patches.js') + read_part('report.js'),
             # Escape '<', so that no string can contain '</script>'.
             'data': json.dumps(data, separators=(',', ':')).replace('<', '\\u003c')}
    return fill_page('report', title, parts, scripts=True)


def _row(example: Example, patch_size: int, merged: bool) -> dict[str, Any]:
    """Returns the data of one image. If `merged`, they include the token of each patch."""
    views = [{'guesses': [[name, round(share, 4)] for name, share in view.guesses], 'right': view.right,
              'stages': [_stage(stage, _groups(example, stage, patch_size), merged) for stage in view.stages]}
             for view in example.views]
    return {'name': example.name, 'truth': example.truth, 'views': views,
            'image': jpeg_url(example.image, _JPEG_QUALITY)}


def _stage(stage: ReductionView, groups: np.ndarray, merged: bool) -> dict[str, Any]:
    token_of_patch = {'token_of_patch': _base64(groups.astype('<u2'))} if merged else {}  # -1 becomes 65535
    return {'kept': _base64(np.packbits(groups >= 0)), 'fused': sum(id < 0 for id in stage.kept)} | token_of_patch | {
        name: _levels(values) for name, values in (('attention', stage.attention), ('origin', stage.fused_weights))
        if values is not None}


def _groups(example: Example, stage: ReductionView, patch_size: int) -> np.ndarray:
    rows, columns = grid(example.image, patch_size)
    return patch_groups(np.array(stage.kept), stage.token_of_patch, rows * columns)


def _levels(values: np.ndarray) -> dict[str, Any]:
    """Quantises the values to 0..255, relative to the largest value. NaN becomes 0."""
    values = np.nan_to_num(values)
    peak = float(values.max())
    steps = np.ceil(values / (peak or 1) * 255)  # rounded up, so that no positive value becomes 0
    return {'peak': round(peak, 6), 'sum': round(float(values.sum()), 4), 'of': _base64(steps.astype(np.uint8))}


def _base64(numbers: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(numbers).tobytes()).decode()
