"""Sources of examples: cluttered digits, digit pairs, generated images, tfds data sets, folders, arrays and records."""

from evit_jax.data.sources.arrays import ArraySource as ArraySource
from evit_jax.data.sources.base import Source as Source
from evit_jax.data.sources.digits_source import DigitsSource as DigitsSource
from evit_jax.data.sources.records import RecordSource as RecordSource
from evit_jax.data.sources.registry import OBJECTS as OBJECTS
from evit_jax.data.sources.registry import as_source as as_source
from evit_jax.data.sources.registry import check_classes as check_classes
from evit_jax.data.sources.registry import open_source as open_source
from evit_jax.data.sources.registry import split_of as split_of
