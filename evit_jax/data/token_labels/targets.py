"""What each token of a training image is to be told: its part of the image's label map, as probabilities of classes.

The map is cropped and mirrored with the image, brought to the grid of tokens and to one cell (the image's own label) by
RoI-align, and only then put through a softmax over all classes, in which a class without a value has the value 0. So
does the reference, with all L classes: 0.8 GB of a batch of 1,024 images and 1,000 classes. Here the few that a map
names are enough, and of them the likeliest stay; the others share what these leave. That is a departure.

What RandAugment turns, shears or shifts takes its tokens along, the nearest to each place; as there, but that it moves
the map before it is cropped. The image's own label is then the mean of the tokens.

Source: LV-ViT, arXiv 2104.10858; zihangJiang/TokenLabeling, `get_label` of tlt/data/mixup.py.
"""

from typing import Any, NamedTuple

import numpy as np

from evit_jax.data.token_labels.label_maps import LabelMap, LabelMaps
from evit_jax.data.token_labels.roi_align import align, axis_weights
from evit_jax.data.transforms import augment
from evit_jax.data.transforms.geometry import Part

STAY = 10  # classes of a token that keep a value of their own


class TokenTargets(NamedTuple):
    """Makes the rows of a batch that tell what is where in an image.

    A target of L classes is `value` at the classes in `index`, and (1 - sum of value) / L added at every class: a value
    is what a class has more than those without one. All sum to 1; a class that fills a gap has the value 0.
    """

    maps: LabelMaps
    grid: int  # tokens along a side

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and type of each row, K = min(10, L): token_value, token_index [P, K], label_value, label_index [K]."""
        stay = min(STAY, self.maps.metadata.classes)
        return {f'{of}_{name}': ((*tokens, stay), dtype) for of, tokens in (('token', (self.grid**2,)), ('label', ()))
                for name, dtype in (('value', np.float32), ('index', np.int32))}

    def rows(self, example: str, part: Part) -> dict[str, np.ndarray]:
        """The rows of an example of which this part is shown.

        Raises:
          ValueError: there is no map of it.
        """
        classes, dense = _dense(self.maps[example])
        tokens, moved = _moved(_aligned(dense, part, self.grid), part)
        label = tokens.mean(axis=(0, 1), keepdims=True) if moved else _aligned(dense, part, 1)
        made, total = {}, self.maps.metadata.classes
        for of, logits in (('token', tokens), ('label', label)):
            value, place = sparse_softmax(logits.reshape(-1, len(classes)), total, min(STAY, total))
            made |= {f'{of}_value': value, f'{of}_index': np.append(classes, 0).astype(np.int32)[place]}
        return {name: made[name].reshape(shape) for name, (shape, _) in self.shapes.items()}


def _dense(label_map: LabelMap) -> tuple[np.ndarray, np.ndarray]:
    """The classes [U] that a map names, and its values [G, G, U] of them, 0 where it names another."""
    classes, place = np.unique(label_map.index, return_inverse=True)
    top, side, _ = label_map.index.shape
    dense = np.zeros((side, side, len(classes)), np.float32)
    np.put_along_axis(dense, place.reshape(top, side, side).transpose(1, 2, 0), label_map.value.transpose(1, 2, 0), -1)
    return classes, dense


def _aligned(dense, part, grid):
    """What a grid over the part says, [grid, grid, U]."""
    cells = dense.shape[0]
    rows = axis_weights(part.top, part.bottom, cells, grid)
    if part.mirrored:
        columns = axis_weights(1 - part.right, 1 - part.left, cells, grid)[:, ::-1]
    else:
        columns = axis_weights(part.left, part.right, cells, grid)
    return align(dense, rows, columns)


def _moved(tokens, part):
    """Each token as the one from whose place its middle comes, 0 from beyond the border; and whether any moved."""
    grid = len(tokens)
    middles = (np.arange(grid) + 0.5) / grid
    x, y, inside = augment.sources(*np.meshgrid(middles, middles), part.drawn)
    columns, rows = (np.clip(at * grid, 0, grid - 1).astype(int) for at in (x, y))
    places = rows * grid + columns
    if inside.all() and np.array_equal(places.ravel(), np.arange(grid * grid)):
        return tokens, False
    return np.where(inside[..., None], tokens[rows, columns], 0), True


def sparse_softmax(logits: np.ndarray, total: int, stay: int) -> tuple[np.ndarray, np.ndarray]:
    """The softmax over `total` classes of which U have these logits and all others 0, by its likeliest classes.

    Args:
      logits: [N, U] float32.

    Returns:
      value, place: [N, stay], best first: by how much each is above the level of the classes without a value, and which
      of the U it is. What is missing has the value 0 and the place U.
    """
    named = min(stay, logits.shape[1])
    top = np.maximum(logits.max(axis=1, keepdims=True), 0)
    chance = np.exp(logits - top)
    chance /= chance.sum(axis=1, keepdims=True) + (total - logits.shape[1]) * np.exp(-top)
    place = np.argpartition(-chance, named - 1, axis=1)[:, :named]
    place = np.take_along_axis(place, np.argsort(-np.take_along_axis(chance, place, 1), axis=1, kind='stable'), 1)
    value = np.take_along_axis(chance, place, 1)
    level = (1 - value.sum(axis=1, keepdims=True)) / (total - named) if total > named else 0
    gap = ((0, 0), (0, stay - named))
    return np.pad(value - level, gap), np.pad(place, gap, constant_values=logits.shape[1])
