"""Selects a few evaluated images for a picture, spread over the classes."""

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from evit_jax.runtime import distributed


class _Row(NamedTuple):
    priority: tuple
    label: int
    index: int  # position in the data
    arrays: dict[str, Any]


class Examples:
    """Collects images during an evaluation: the first image of each class, then the second of each class, and so on.

    If `count` is less than the number of classes, evenly spaced classes are selected. The selection depends only on the
    labels and the order of the data, so it is the same for any number of processes. Each process stores its own rows.

    Args:
      count: number of images to collect.
      classes: number of classes.
    """

    def __init__(self, count: int, classes: int):
        self._count = count
        self._first_classes = {*np.linspace(0, max(classes - 1, 0), min(count, classes)).round().astype(int).tolist()}
        self._class_counts: collections.Counter[int] = collections.Counter()
        self._rows: list[_Row] = []
        self._blank: dict[str, Any] = {}

    def add(self, arrays: Mapping[str, Any], batch: Mapping[str, np.ndarray]) -> None:
        """Adds the images of a batch that rank high enough.

        Args:
          arrays: tree of arrays [B, ...] whose rows are collected.
          batch: label, weight (0: padding or unreadable) and index in the data, each [B].
        """
        if not self._count:
            return
        self._blank = jax.tree.map(lambda array: np.zeros_like(array[0]), dict(arrays))
        for row in np.flatnonzero(batch['weight']).tolist():
            label, index = int(batch['label'][row]), int(batch['index'][row])
            priority = self._priority(self._class_counts[label], label)
            self._class_counts[label] += 1
            if len(self._rows) == self._count and priority > self._rows[-1].priority:
                continue
            arrays_of_row = jax.tree.map(lambda array: np.array(array[row]), dict(arrays))  # noqa: B023, used at once
            self._rows.append(_Row(priority, label, index, arrays_of_row))
            self._rows.sort(key=lambda each: each.priority)
            del self._rows[self._count:]

    def collect(self) -> dict[str, Any]:
        """Returns a tree of arrays with the selected rows of all processes, in data order; {} if there are none.

        This is a collective operation: all processes must call it.
        """
        if not self._count:
            return {}
        selected = self._select(self._rows)
        if not distributed.is_single_process():
            selected = self._select_globally()
        return jax.tree.map(lambda *rows: np.stack(rows), *(row.arrays for row in selected)) if selected else {}

    def _priority(self, number, label):
        """Returns the rank of the `number`-th image of its class; images with low ranks are selected."""
        return number, label not in self._first_classes, label

    def _select(self, rows):
        class_counts: collections.Counter[int] = collections.Counter()
        ranked = []
        for row in sorted(rows, key=lambda row: row.index):
            ranked.append(row._replace(priority=self._priority(class_counts[row.label], row.label)))
            class_counts[row.label] += 1
        return sorted(sorted(ranked, key=lambda row: row.priority)[:self._count], key=lambda row: row.index)

    def _select_globally(self):
        """Selects rows across all processes and broadcasts their arrays."""
        own = np.full((self._count, 2), -1, np.int32)
        for number, row in enumerate(self._rows):
            own[number] = row.label, row.index
        gathered = distributed.gather(own).tolist()
        held = {row.index: row.arrays for row in self._rows}
        selected = self._select(_Row((), label, index, {}) for label, index in gathered if index >= 0)
        return [row._replace(arrays=distributed.broadcast(held.get(row.index, self._blank), sender=row.index in held))
                for row in selected]
