"""The protocol of sources of examples."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Source(Protocol):
    """A finite, random-access collection of labelled images. Grain pickles the source and sends it to its workers.

    `source[i]` returns a dict with these keys:

      image: encoded bytes, or uint8 [H, W, 3].
      label: int in [0, num_classes).
      id: str, unique within the source.
      mask: optional; encoded bytes, or uint8 [H, W]. Values above 127 mark the object.

    Optional attributes:

      split: str, the split or slice that was opened; see `split_of`.
      slices: list of `splits.SplitSlice`, the stored splits that the examples come from.
      labels: int32 [N], the labels of all examples.
      fingerprint: str that changes with the examples or their order. A run records it and refuses to resume on other
        data. Without this attribute, the number of examples and the class names are compared.

    Raises:
      OSError, ValueError: `source[i]` is unreadable or invalid; the message names the example.
    """
    num_classes: int
    class_names: tuple[str, ...]
    image_size: int | None  # side in pixels if all images are squares of the same size, else None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


def check_index(index: int, length: int) -> None:
    """Raises an IndexError unless 0 <= index < length; sources do not accept negative indices."""
    if not 0 <= index < length:
        raise IndexError(f'example {index} of {length}')
