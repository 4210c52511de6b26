"""Builds folders of images, and imitates file systems."""

import os
import time
import types

import numpy as np
from PIL import Image

from evit_jax.data.sources.folder import FolderSource


def fill(root, counts, suffix='.jpg'):
    """Writes files root/<class>/<number>.jpg whose content is their name. Returns the root."""
    for name, count in counts.items():
        for number in range(count):
            path = root / name / f'{number:03d}{suffix}'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f'{name} {number}')
    return root


def settle(root):
    """Sets the times of all folders to 100 seconds ago, so that the list of files is cached."""
    for path, _, _ in os.walk(root, followlinks=True):
        os.utime(path, (time.time() - 100,) * 2)


def change_status(monkeypatch, applies, **fields):
    """Patches os.stat: it returns these fields for each path for which `applies` returns True."""
    stat = os.stat

    def changed(path, **options):
        status = stat(path, **options)
        if not applies(os.fspath(path)):
            return status
        values = {name: getattr(status, name) for name in dir(status) if name.startswith('st_')}
        return types.SimpleNamespace(**values | fields)

    monkeypatch.setattr(os, 'stat', changed)


def hide_inodes(monkeypatch):
    """Patches os.stat to return no inodes, as on some network file systems."""
    change_status(monkeypatch, lambda path: True, st_ino=0)


def examples(path, split='train', **arguments):
    source = FolderSource(path, split, **arguments)
    return [source[i] for i in range(len(source))]


def ids(path, split='train'):
    return [example['id'] for example in examples(path, split)]


def draw_stripes(folder, broken=0):
    """Writes 24 images to train on and 8 to evaluate on, horizontal or vertical stripes, and `broken` invalid files."""
    for split, count in (('train', 12), ('val', 4)):
        for label, name in enumerate(('oak', 'pine')):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                rng = np.random.default_rng([label, number])
                stripes = np.repeat(rng.integers(0, 256, (10, 1, 3), np.uint8), 40, axis=1).repeat(3, axis=0)
                picture = Image.fromarray(stripes if label else stripes.swapaxes(0, 1))
                picture.save(folder / split / name / f'{number}.{"jpg" if number % 2 else "png"}')
    for number in range(broken):
        for split in ('train', 'val'):
            (folder / split / 'oak' / f'broken {number}.jpg').write_bytes(b'\xff\xd8 no image')
    return folder
