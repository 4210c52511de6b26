"""The protocol that every source of examples follows."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Source(Protocol):
    """A finite, random-access set of labelled images. Grain pickles it to worker processes.

    `source[i]` returns a dict with these keys:

      image: encoded bytes, or uint8 [H, W, 3].
      label: int in [0, num_classes).
      id: str, unique within the source.
      mask: optional; encoded bytes, or uint8 [H, W], above 127 on the object.

    Optional attributes:

      split: str, the split or slice that was opened; see `split_of`.
      slices: list of `splits.SplitSlice`, the stored splits that the examples come from.
      labels: int32 [N], the labels of all examples.
      fingerprint: str that changes with the examples or their order. A run records it and refuses to resume on other
        data. If absent, the number of examples and the class names are compared.

    Raises:
      OSError, ValueError: `source[i]` is unreadable or invalid; the message names the example.
    """
    num_classes: int
    class_names: tuple[str, ...]
    image_size: int | None  # side in pixels if all images are squares of one size

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...
