"""Fills the HTML templates of this package. A page is one file that loads nothing from elsewhere."""

import base64
import html
import io
import pathlib
import re

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from evit_jax.viz.plot_style import BLUE, GREEN, GREY, INK, ORANGE, RULE

# The colours of plots, as variables of page.css: a page has other colours in dark mode.
_VARIABLES = {BLUE: '--blue', GREEN: '--green', ORANGE: '--orange', INK: '--ink', GREY: '--soft', RULE: '--rule',
              '#c9ced6': '--edge'}
_NO_METADATA = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))


def read_part(name: str) -> str:
    """Returns the text of a file in this package, such as 'report.js'."""
    return pathlib.Path(__file__).with_name(name).read_text(encoding='utf-8')


def _fill(template: str, parts: dict[str, str]) -> str:
    """Replaces each {{name}} in a template. {{name}} within a part stays."""
    return re.sub(r'\{\{(\w+)\}\}', lambda match: parts[match[1]], template)


def fill_page(name: str, title: str, parts: dict[str, str], *, scripts: bool = False,
              requests: bool = False) -> str:
    """Returns a page of this package as HTML.

    Args:
      name: name of the body, NAME.html, and of the style sheet, NAME.css; the page also has page.css, and panel.css if
        it has scripts.
      title: title of the page, not escaped.
      parts: name -> part that replaces {{name}} in the body, escaped; the title is added.
      scripts: allows scripts in the page.
      requests: allows scripts to send requests to the server of the page.
    """
    title = html.escape(title)
    return _fill(read_part('page.html'), {
        'title': title, 'style': ''.join(map(read_part, ('page.css', *(['panel.css'] * scripts), f'{name}.css'))),
        'script_policy': "; script-src 'unsafe-inline'" * scripts + "; connect-src 'self'" * requests,
        'body': _fill(read_part(f'{name}.html'), parts | {'title': title})})


def jpeg_url(image: np.ndarray, quality: int) -> str:
    """Returns an image [H, W, 3] uint8 as the URL of a JPEG that contains its data."""
    jpeg = io.BytesIO()
    Image.fromarray(image).save(jpeg, 'JPEG', quality=quality, subsampling=0)
    return f'data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}'


def svg(figure: Figure, name: str, description: str) -> str:
    """Returns a figure as an SVG element that scales with the page, and has its font and colours.

    Args:
      name: name of the figure; unique in the page.
      description: text for readers who do not see the figure.
    """
    file = io.StringIO()
    with rc_context({'svg.fonttype': 'none', 'svg.hashsalt': name}):
        figure.savefig(file, format='svg', transparent=True, metadata=_NO_METADATA)
    text = file.getvalue()
    text = text[text.index('<svg'):]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"|(?<=<g) id="[^"]*"', '', text)  # HTML needs no namespaces, and unique ids
    view_box = re.search(r'viewBox="([^"]*)"', text)[1]
    text = f'<svg viewBox="{view_box}" role="img" aria-label="{html.escape(description)}">{text[text.index(">") + 1:]}'
    text = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", 'inherit', text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f'var({variable})')
    return text
