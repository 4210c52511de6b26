"""Builds folders of images, and imitates file systems."""

import os
import time
import types

from evit_jax.data.sources.folder import FolderSource


def fill(root, counts, suffix='.jpg'):
    """Writes root/<class>/<number>.jpg files that contain their own name, and returns the root."""
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
    """Makes os.stat return these fields for the paths for which `applies` returns True."""
    stat = os.stat

    def changed(path, **options):
        status = stat(path, **options)
        if not applies(os.fspath(path)):
            return status
        values = {name: getattr(status, name) for name in dir(status) if name.startswith('st_')}
        return types.SimpleNamespace(**values | fields)

    monkeypatch.setattr(os, 'stat', changed)


def hide_inodes(monkeypatch):
    """Makes os.stat return no inodes, as on some network file systems."""
    change_status(monkeypatch, lambda path: True, st_ino=0)


def examples(path, split='train', **arguments):
    source = FolderSource(path, split, **arguments)
    return [source[i] for i in range(len(source))]


def ids(path, split='train'):
    return [example['id'] for example in examples(path, split)]
