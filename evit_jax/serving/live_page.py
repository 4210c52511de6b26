"""The live page of the server, and the sample images that it offers."""

import html
from collections.abc import Sequence
from typing import NamedTuple

from evit_jax.serving.served_model import ServedModel


class Samples(NamedTuple):
    """Sample images by name: JPEG files."""

    files: dict[str, bytes]

    @classmethod
    def for_classes(cls, class_names: Sequence[str]) -> 'Samples':
        """Returns the samples for a model with these classes."""
        return cls({})


def live_page(served: ServedModel, samples: Samples) -> str:
    """Returns the page as HTML."""
    return f'<!doctype html><title>{html.escape(served.name)}</title>'
