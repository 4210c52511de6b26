"""What is known of one model under one plan."""

from typing import NamedTuple


class Result(NamedTuple):
    series: str            # results of the same name are joined by a line
    label: str             # of the point, as the keep rate
    top1: float | None     # of 1
    macs: int | None       # of an image
    speed: float | None    # images a second
    measured: bool = False  # the speed was measured by itself, not in an evaluation
