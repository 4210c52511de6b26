"""Checks the layout of an image folder, `path/train/<class>/*.jpg`. Errors suggest fixes for common other layouts."""

import os
import shlex
import unicodedata
from collections.abc import Hashable, Sequence

import numpy as np
from absl import logging

from evit_jax.data import splits
from evit_jax.data.classes import display_name, lookalike_key, lookalikes
from evit_jax.data.names import in_one_line
from evit_jax.data.sources import folder_entries
from evit_jax.data.sources.folder_entries import entries, folders, has_image, is_image, summarize

_ARCHIVES = ('.tar', '.zip', '.gz', '.tgz', '.7z', '.rar')
# Folder names of segmentation and detection data sets, as lower-case letters only.
_IMAGES = {'image', 'images', 'img', 'imgs', 'jpegimages', 'photos', 'pictures'}
_ANNOTATIONS = {'ann', 'annotation', 'annotations', 'anns', 'bboxes', 'boxes', 'depth', 'groundtruth', 'gt', 'label',
                'labels', 'mask', 'masks', 'seg', 'segmentation', 'segmentationclass', 'segmentationobject',
                'segmentations', 'trimap', 'trimaps'}


def split_folders(path: str) -> list[str]:
    """Returns the names of the split folders in `path`.

    Raises:
      FileNotFoundError: there are no split folders; the message suggests where they may be.
      ValueError: the path is a bucket.
    """
    if '://' in path:
        raise ValueError(f"{path!r}: source 'folder' reads mounted folders; mount the bucket, or use source 'tfds'")
    present = {entry.name: entry for entry in entries(path)}
    available = [name for name in ('train', *splits.HELD_OUT)
                 if name in present and (name == 'train' or not present[name].is_file())]
    if not available:
        raise FileNotFoundError(f'{path!r} has no folder train/, but {summarize([*present], "entry", "entries")}: '
                                'images are expected as train/<class>/*.jpg, and as val/<class>/*.jpg to evaluate on'
                                + _suggest_path(path))
    return available


def labelled_splits(path: str, available: Sequence[str]) -> list[str]:
    """Returns the splits that have labels. Only a test/ without class folders has none."""
    return [name for name in available if name != 'test' or folders(os.path.join(path, name))]


def check_split(path: str, split: str, available: Sequence[str]) -> None:
    """Raises a ValueError if the split names an existing folder that is not in `available`."""
    for name in splits.base_names(split):
        if name and name not in available and os.path.isdir(os.path.join(path, name)):
            raise ValueError(f'no split {name!r} (there are {", ".join(available)}): rename the folder '
                             f'{os.path.join(path, name)!r} to {" or ".join(splits.HELD_OUT)}')


def class_names(path: str, available: Sequence[str]) -> tuple[str, ...]:
    """Returns the sorted display names of the classes in train/, or in all splits if there is no train/.

    Raises:
      ValueError: see `class_folders`.
    """
    used = ['train'] if 'train' in available else labelled_splits(path, available) or available
    return tuple(sorted({display_name(name) for split in used for name in class_folders(os.path.join(path, split))}))


def class_folders(folder: str) -> tuple[str, ...]:
    """Returns the names of the class folders of a split.

    Raises:
      ValueError: there are no class folders, the folder also holds images or broken links, or two class names are equal
        as displayed.
    """
    present = entries(folder)
    classes = tuple(entry.name for entry in present if entry.is_dir())
    if broken := [entry.name for entry in present if not os.path.exists(entry.path)]:
        raise ValueError(f'{folder!r} holds {summarize(broken, "broken link")}: repair or remove them')
    stray = [entry.name for entry in present if is_image(entry.name) and entry.name not in classes]
    if stray:
        raise ValueError(f'{folder!r} holds {summarize(stray, "image")} outside of any class: move to '
                         f'{folder}/<class>/')
    if not classes:
        raise ValueError(f'{folder!r} holds no folders of classes: images are expected as {folder}/<class>/*.jpg')
    by_name: dict[str, str] = {}
    for name in classes:
        if (other := by_name.setdefault(display_name(name), name)) != name:
            raise ValueError(f'{folder!r} has two folders of the class {display_name(name)!r}'
                             f'{_difference(other, name)} ({other!a} and {name!a}): move the images of one into '
                             'the other, or rename one')
    return classes


def _difference(one: str, other: str) -> str:
    """Returns the reason why two folder names have the same display name, for a message."""
    forms = {unicodedata.normalize('NFC', name) for name in (one, other)}
    return ', in two forms of Unicode' if len(forms) == 1 else ', which are displayed alike'


def check_classes(path: str) -> None:
    """Checks the training classes before images are listed, and warns of class names that look alike.

    Raises:
      ValueError: there is only one class, the folders hold splits or annotations, or two classes link to one folder.
        The message suggests where the classes may be.
    """
    available = split_folders(path)
    folder = os.path.join(path, 'train' if 'train' in available else available[0])
    classes = class_names(path, available)
    if _are_splits(classes):
        raise ValueError(f'{folder!r} holds folders of splits ({", ".join(classes)}) and not of classes: give '
                         f'--config.data.path={shlex.quote(folder)}')
    _check_annotations(folder, classes)
    if len(classes) == 1:
        raise ValueError(f'{folder!r} has one class only ({classes[0]}), and a model needs two or more'
                         + _classes_below(folder, class_folders(folder)[0]))
    _warn_of_classes(folder, classes)
    for split in available:
        if hidden := folder_entries.hidden_folders(os.path.join(path, split)):
            logging.warning('%r: skipped, because the name begins with a dot: %s with images; rename those that are '
                            'classes', os.path.join(path, split), summarize(hidden, 'folder'))
    trained = _folder_identities(folder)
    for split in available[1:] if 'train' in available else ():
        held_out = _folder_identities(os.path.join(path, split))
        if shared := [name for identity, name in held_out.items() if identity in trained]:
            logging.warning('%r: folders of %s/ are links to train/ or the reverse, so training uses their images: '
                            '%s', path, split, summarize(shared, 'class'))


def check_not_splits(folder: str, classes: Sequence[str]) -> None:
    """Raises a ValueError if the class folders are actually split folders."""
    if _are_splits(classes):
        raise ValueError(f'{folder!r} holds folders of splits ({", ".join(classes)}) and not of classes: give one of '
                         f'them, such as {os.path.join(folder, "train")!r}')


def _are_splits(classes: Sequence[str]) -> bool:
    return 'train' in classes and set(classes) <= {'train', *splits.HELD_OUT}


def check_known(folder: str, classes: Sequence[str], known: Sequence[str]) -> None:
    """Checks that all evaluation classes are training classes.

    Args:
      classes: names of the folders in `folder`.
      known: display names of the training classes.

    Raises:
      ValueError: a class is not among the training classes.
    """
    names = {*known}
    unknown = [name for name in classes if display_name(name) not in names]
    if not unknown:
        return
    keys = {lookalike_key(name): name for name in known}
    near = next(((name, keys[key]) for name in unknown if (key := lookalike_key(display_name(name))) in keys), None)
    if near:
        hint = f'; {near[0]!r} differs from {near[1]!r} of train/ only in case or spaces: rename the folder'
    else:
        candidates = [os.path.join(folder, name) for name in unknown[:folder_entries.MAX_SEARCHED]]
        parents = [parent for each in candidates if (parent := _find_known(known, each))]
        hint = f'; the classes are in {parents[0]!r}: move its folders up into {folder!r}' if parents else ''
    raise ValueError(f'{folder!r} has {summarize(unknown, "class")} that train/ does not have: move or remove '
                     f'{"it" if len(unknown) == 1 else "them"}{hint}')


def check_labels(path: str, split: str, resolved: str, class_names: Sequence[str], labels: np.ndarray) -> None:
    """Warns of classes without images in a split, and of unused folders.

    Args:
      split: the requested split.
      resolved: the result of `splits.resolve`.
      labels: int32 [N], labels of the split.

    Raises:
      ValueError: a tenth of train/ is held out for evaluation, and a class has no training images left.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    missing = summarize([name for name, count in zip(class_names, counts) if not count], 'class')
    held_out = resolved != split and resolved.startswith('train[')
    if held_out and split != 'train':
        _warn_of_unused(path)
    if counts.all():
        return
    if held_out and split == 'train':
        raise ValueError(f'{path!r} has no val/, so a tenth of train/ is held out to evaluate on, and with it '
                         f'all images of {missing}: add images to these classes, make val/<class>/, or train and '
                         "evaluate on all images with --config.data.train_split='train[:100%]' "
                         "--config.data.test_split='train[:100%]'")
    logging.warning('%r: split %r has no image of %s; there are %d classes', path, resolved, missing, len(class_names))


def warn_of_depth(folder: str, images: Sequence[str]) -> None:
    """Warns if the class folders hold only subfolders, and these have the same names in every class.

    Args:
      folder: folder of a split.
      images: paths of the images in the folder, relative to it.
    """
    below: dict[str, set[str]] = {}
    for name in images:
        kind, inner, *deeper = name.split('/')
        if not deeper:
            return
        below.setdefault(kind, set()).add(inner)
    shared = set.intersection(*below.values())
    if len(below) > 1 and len(shared) > 1:
        logging.warning('%r: no class folder (%s) holds images itself, and all of them hold %s: if these are the '
                        'classes, move them up', folder, ', '.join(map(in_one_line, list(below)[:5])),
                        summarize(sorted(shared), 'folder'))


def _check_annotations(folder: str, classes: Sequence[str]) -> None:
    """Raises a ValueError if the folders belong to a segmentation or detection data set."""
    letters = {''.join(filter(str.isalpha, name.lower())): name for name in classes}
    images = sorted(letters.keys() & _IMAGES)
    if len(classes) > 1 and images and letters.keys() <= _IMAGES | _ANNOTATIONS:
        raise ValueError(f'{folder!r} holds folders of images and of annotations ({", ".join(classes)}) and not of '
                         f'classes{_classes_below(folder, letters[images[0]])}; if these are the classes, rename '
                         f'{letters[images[0]]!r}')


def _warn_of_classes(folder: str, classes: Sequence[str]) -> None:
    for one, other in lookalikes(classes):
        logging.warning('%r has two classes whose names differ only in case or spaces: %r and %r', folder, one, other)
    packed = [entry.name for entry in entries(folder) if entry.name.lower().endswith(_ARCHIVES)]
    if packed := [name for name in packed if name not in classes]:
        logging.warning('%r holds %s, which are not read: unpack or remove them', folder,
                        summarize(packed, 'packed file'))


def _warn_of_unused(path: str) -> None:
    if unused := [entry.name for entry in entries(path) if entry.is_dir() and entry.name != 'train']:
        logging.warning('%r has no folder %s with folders of classes, so a tenth of train/ is held out; not used: %s; '
                        'rename one that you mean to evaluate on', path, ' or '.join(splits.HELD_OUT),
                        summarize(unused, 'folder'))
    for file in (os.path.join(path, name) for name in splits.HELD_OUT):
        if os.path.isfile(file):
            logging.warning('%r is a file, not a folder of images: it is not used', file)


def _suggest_path(path: str) -> str:
    """Suggests a fix for a path without train/. Returns '' if no data set is found nearby."""
    parent, name = os.path.split(os.path.abspath(path))
    below = folders(path)
    if name in ('train', *splits.HELD_OUT) and any(has_image(os.path.join(path, each)) for each in below):
        return f'. This is the folder of a split: give --config.data.path={shlex.quote(parent)}'
    if within := [each for each in below if os.path.isdir(os.path.join(path, each, 'train'))]:
        inner = shlex.quote(os.path.join(path, within[0]))
        return f'. {summarize(within, "folder")} in it with train/: give --config.data.path={inner}'
    if near := [each for each in below if each.strip().lower().startswith('train')]:
        return f'. Rename {near[0]!r} to train'
    if classes := [each for each in below if has_image(os.path.join(path, each))]:
        return (f'. {summarize(classes, "folder")} in it with images: if these are the classes, move them into '
                f'{os.path.join(path, "train")}; or make a new folder with a link named train to {path!r}, and give '
                'the new folder')
    return ''


def _classes_below(folder: str, name: str) -> str:
    """Suggests a fix if `name` is the only class: its subfolders may be the classes."""
    parent = os.path.join(folder, name)
    below = folders(parent)
    for _ in range(folder_entries.MAX_DEPTH):
        if len(below) == 1:
            parent = os.path.join(parent, below[0])
            below = folders(parent)
    if 'train' in below:
        return f': the data set is one folder further down, give --config.data.path={shlex.quote(parent)}'
    with_images = [each for each in below if has_image(os.path.join(parent, each))]
    if len(with_images) < 2:
        return f': images are expected as {folder}/<class>/*.jpg'
    return (f'. The level below looks like the classes: {summarize(with_images, "folder")} in {parent!r}: move them up '
            f'into {folder!r}')


def _folder_identities(folder: str) -> dict[Hashable, str]:
    """Maps the identity of each class folder on disk to its name.

    Raises:
      ValueError: two names refer to one folder.
    """
    names: dict[Hashable, str] = {}
    for name in folders(folder):
        other = names.setdefault(folder_entries.identity(os.path.join(folder, name)), name)
        if other != name:
            raise ValueError(f'{folder!r}: the classes {other!r} and {name!r} are one folder: one is a link, remove it')
    return names


def _find_known(known: Sequence[str], folder: str) -> str:
    """Returns the folder whose subfolders are all known classes: `folder`, or a nested only subfolder; else ''."""
    for _ in range(folder_entries.MAX_DEPTH):
        below = folders(folder)
        if below and {display_name(name) for name in below} <= set(known):
            return folder
        if len(below) != 1:
            return ''
        folder = os.path.join(folder, below[0])
    return ''
