"""Records the tokens and the features of a model on the first test images, for the analysis of a comparison."""

import os
import pathlib
from typing import NamedTuple

import numpy as np

from evit_jax.data import pipeline
from evit_jax.data.sources import Source
from evit_jax.inference import knn
from evit_jax.inference.model import VisionModel
from evit_jax.viz.patches import patch_groups

_FILE = 'tokens.npz'


class Record(NamedTuple):
    """The tokens and features of N images of P patches."""

    groups: np.ndarray    # [S, N, P] int16: index of the token that shows each patch after reduction s; -1: hidden
    blocks: np.ndarray    # [S] int: block of each reduction
    features: np.ndarray  # [N, D] float32: the features that the head reads
    grid: np.ndarray      # [2] int: rows and columns of the patches
    depth: np.ndarray     # [] int: number of blocks


def record(model: VisionModel, source: Source, count: int, folder: str | os.PathLike) -> None:
    """Writes the record of the first `count` readable test images to a folder."""
    batches = pipeline.eval_batches(source, batch_size=knn.BATCH_SIZE, transform=model.loaded.eval_transform(),
                                    num_workers=0)
    compiled, plan = model.compiled(knn.BATCH_SIZE), model.plan
    groups, features = [], []
    try:
        for batch in batches:
            readable = batch['weight'] > 0
            output = compiled.run('forward', batch['image'], plan)
            features.append(np.asarray(output.features)[readable])
            stages = [[patch_groups(*tokens, plan.patches) for tokens in zip(np.asarray(kept), np.asarray(of_patch))]
                      for kept, of_patch in zip(output.kept, output.token_of_patch)]
            groups.append(np.asarray(stages, np.int16).reshape(
                len(stages), len(readable), plan.patches)[:, readable])
            if sum(map(len, features)) >= count:
                break
    finally:
        batches.close()
    write(Record(np.concatenate(groups, axis=1)[:, :count], np.asarray(plan.reductions, int),
                 np.concatenate(features)[:count], np.asarray(model.config.grid(model.loaded.image_size)),
                 np.asarray(model.config.depth)), folder)


def write(record: Record, folder: str | os.PathLike) -> None:
    """Writes a record to a folder, which may be new."""
    path = pathlib.Path(folder) / _FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **record._asdict())


def read(folder: str | os.PathLike) -> Record | None:
    """Reads the record in a folder; None if there is none."""
    path = pathlib.Path(folder) / _FILE
    if not path.exists():
        return None
    with np.load(path) as arrays:
        return Record(**{name: arrays[name] for name in Record._fields})
