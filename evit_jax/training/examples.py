"""A few of the evaluated images for a picture, spread over the classes."""

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from evit_jax.runtime import distributed


class _Row(NamedTuple):
    priority: tuple
    label: int
    index: int  # in the data
    arrays: dict[str, Any]


class Examples:
    """Collects images during an evaluation: of each class the first one, then of each class the second one, and so on.

    Where there are more classes than images to show, the classes are evenly spread, too. The choice depends on labels
    and positions in the data alone: it is the same for any number of processes, of which each has its own rows.
    """

    def __init__(self, count: int, classes: int):
        self._count = count
        self._first_classes = {*np.linspace(0, max(classes - 1, 0), min(count, classes)).round().astype(int).tolist()}
        self._seen: collections.Counter[int] = collections.Counter()
        self._rows: list[_Row] = []
        self._blank: dict[str, Any] = {}

    def add(self, arrays: Mapping[str, Any], batch: Mapping[str, np.ndarray]) -> None:
        """Looks at a batch.

        Args:
          arrays: tree of arrays [B, ...], of which the chosen rows are kept.
          batch: its label, weight (0: padding, or unreadable), and index in the data.
        """
        if not self._count:
            return
        self._blank = jax.tree.map(lambda array: np.zeros_like(array[0]), dict(arrays))
        for row in np.flatnonzero(batch['weight']).tolist():
            label, index = int(batch['label'][row]), int(batch['index'][row])
            priority = self._priority(self._seen[label], label)
            self._seen[label] += 1
            if len(self._rows) == self._count and priority > self._rows[-1].priority:
                continue
            arrays_of_row = jax.tree.map(lambda array: np.array(array[row]), dict(arrays))  # noqa: B023, used at once
            self._rows.append(_Row(priority, label, index, arrays_of_row))
            self._rows.sort(key=lambda each: each.priority)
            del self._rows[self._count:]

    def chosen(self) -> dict[str, Any]:
        """The tree of arrays with the chosen rows of all processes, in the order of the data; {} without any.

        All processes call this together.
        """
        if not self._count:
            return {}
        chosen = self._chosen_of(self._rows)
        if not distributed.is_single_process():
            chosen = self._exchanged()
        return jax.tree.map(lambda *rows: np.stack(rows), *(row.arrays for row in chosen)) if chosen else {}

    def _priority(self, number, label):
        """The rank of the `number`-th image of its class; images with low ranks are kept."""
        return number, label not in self._first_classes, label

    def _chosen_of(self, rows):
        seen: collections.Counter[int] = collections.Counter()
        found = []
        for row in sorted(rows, key=lambda row: row.index):
            found.append(row._replace(priority=self._priority(seen[row.label], row.label)))
            seen[row.label] += 1
        return sorted(sorted(found, key=lambda row: row.priority)[:self._count], key=lambda row: row.index)

    def _exchanged(self):
        """The choice among the rows of all processes."""
        own = np.full((self._count, 2), -1, np.int32)
        for number, row in enumerate(self._rows):
            own[number] = row.label, row.index
        every = distributed.gather(own).tolist()
        held = {row.index: row.arrays for row in self._rows}
        chosen = self._chosen_of(_Row((), label, index, {}) for label, index in every if index >= 0)
        return [row._replace(arrays=distributed.broadcast(held.get(row.index, self._blank), sender=row.index in held))
                for row in chosen]
