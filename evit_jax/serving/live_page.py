"""The live page of the server. It holds its samples, and requests nothing but predictions from this server."""

import base64
import html
import json
import pathlib
from collections.abc import Sequence

from evit_jax.data.names import in_one_line
from evit_jax.data.sources import digits
from evit_jax.models.config import as_size, size_text
from evit_jax.serving.served_model import ServedModel
from evit_jax.viz.patches import HEAT_COLOURS
from evit_jax.viz.templates import fill_page, read_part

# Photos from the data of scikit-image: cat (Stefan van der Walt, CC0), coffee (Rachel Michetti, CC0), rocket (SpaceX,
# public domain). They are cropped to squares of 240 pixels.
_PHOTOS = 'cat', 'coffee', 'rocket'
_DIGITS = range(3)  # indices of examples of the test split


def samples(class_names: Sequence[str]) -> dict[str, bytes]:
    """Returns sample images by name, as JPEG files: cluttered digits for a model of digits, else photos."""
    if tuple(class_names) == tuple('0123456789'):
        examples = [digits.example(0, 'test', index) for index in _DIGITS]
        return {f'digits {number}': example['image'] for number, example in enumerate(examples, 1)}
    folder = pathlib.Path(__file__).with_name('samples')
    return {name: (folder / f'{name}.jpg').read_bytes() for name in _PHOTOS}


def live_page(served: ServedModel) -> str:
    """Returns the page as HTML."""
    model = {'default': served.default, 'dense': served.dense, 'plans': served.plans, 'patch_size': served.patch_size,
             'returns_kept': served.returns_kept,
             'colours': base64.b64encode(HEAT_COLOURS.tobytes()).decode(),
             'samples': {name: f'data:image/jpeg;base64,{base64.b64encode(content).decode()}'
                         for name, content in samples(served.class_names).items()}}
    task = f'{len(served.class_names):,} classes' if served.class_names else 'features, no classes'
    size = size_text(as_size(served.image_size))
    metadata = (f'{served.path or served.name}: {task}, images of {size} pixels, patches of {served.patch_size}; '
                f'computed by {served.engine}')
    # Escape '<', so that no string can contain '</script>'.
    data = json.dumps(model, separators=(',', ':')).replace('<', '\\u003c')
    return fill_page('live', f'{served.name}, live', {
        'metadata': html.escape(in_one_line(metadata)), 'data': data,
        'script': read_part('patches.js') + read_part('live.js')}, scripts=True, requests=True)
