"""The layout that a folder of images must have, `path/train/<class>/*.jpg`, and hints where it is another one."""

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
from evit_jax.data.sources.folder_entries import entries, few, folders, has_image, is_image

_PACKED = ('.tar', '.zip', '.gz', '.tgz', '.7z', '.rar')
# Folders of data sets for segmentation and detection, by the lower-case letters of their names.
_IMAGES = {'image', 'images', 'img', 'imgs', 'jpegimages', 'photos', 'pictures'}
_ANNOTATIONS = {'ann', 'annotation', 'annotations', 'anns', 'bboxes', 'boxes', 'depth', 'groundtruth', 'gt', 'label',
                'labels', 'mask', 'masks', 'seg', 'segmentation', 'segmentationclass', 'segmentationobject',
                'segmentations', 'trimap', 'trimaps'}


def split_folders(path: str) -> list[str]:
    """The folders of splits that there are.

    Raises:
      FileNotFoundError: there is none; says where they may be.
    """
    if '://' in path:
        raise ValueError(f"{path!r}: source 'folder' reads mounted folders; mount the bucket, or use source 'tfds'")
    present = {entry.name: entry for entry in entries(path)}
    have = [name for name in ('train', *splits.HELD_OUT)
            if name in present and (name == 'train' or not present[name].is_file())]
    if not have:
        raise FileNotFoundError(f'{path!r} has no folder train/, but {few([*present], "entry", "entries")}: images are '
                                'expected as train/<class>/*.jpg, and as val/<class>/*.jpg to evaluate on'
                                + _way_out(path))
    return have


def labelled(path: str, have: Sequence[str]) -> list[str]:
    """The splits of `have` without a test/ that holds no folders: its images have no labels."""
    return [name for name in have if name != 'test' or folders(os.path.join(path, name))]


def check_split(path: str, split: str, have: Sequence[str]) -> None:
    """Raises a ValueError if a split is a folder by another name than those of `have`."""
    for name in splits.base_names(split):
        if name and name not in have and os.path.isdir(os.path.join(path, name)):
            raise ValueError(f'no split {name!r} (there are {", ".join(have)}): rename the folder '
                             f'{os.path.join(path, name)!r} to {" or ".join(splits.HELD_OUT)}')


def class_names(path: str, have: Sequence[str]) -> tuple[str, ...]:
    """The names of the classes as `display_name`, sorted: those of train/, or of all splits where it is not there.

    Raises:
      ValueError: see `class_folders`.
    """
    used = ['train'] if 'train' in have else labelled(path, have) or have
    return tuple(sorted({display_name(name) for split in used for name in class_folders(os.path.join(path, split))}))


def class_folders(folder: str) -> tuple[str, ...]:
    """The folders of classes in that of a split.

    Raises:
      ValueError: there are none, there are images or broken links beside them, or two have names that are one text.
    """
    found = entries(folder)
    classes = tuple(entry.name for entry in found if entry.is_dir())
    if broken := [entry.name for entry in found if not os.path.exists(entry.path)]:
        raise ValueError(f'{folder!r} holds {few(broken, "link")} that lead nowhere: mend or remove them')
    stray = [entry.name for entry in found if is_image(entry.name) and entry.name not in classes]
    if stray:
        raise ValueError(f'{folder!r} holds {few(stray, "image")} outside of any class: move to {folder}/<class>/')
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
    """The reason why two names of folders are displayed alike, for a message."""
    forms = {unicodedata.normalize('NFC', name) for name in (one, other)}
    return ', in two forms of Unicode' if len(forms) == 1 else ', which are displayed alike'


def check_classes(path: str) -> None:
    """Checks the classes to train on before any image is listed, and warns of class names that look alike.

    Raises:
      ValueError: there is one class only, the folders are those of splits or of images and their annotations (the
        message names where the classes may be), or two classes are one folder.
    """
    have = split_folders(path)
    folder = os.path.join(path, 'train' if 'train' in have else have[0])
    classes = class_names(path, have)
    if 'train' in classes and set(classes) <= {'train', *splits.HELD_OUT}:
        raise ValueError(f'{folder!r} holds folders of splits ({", ".join(classes)}) and not of classes: give '
                         f'--config.data.path={shlex.quote(folder)}')
    _check_annotations(folder, classes)
    if len(classes) == 1:
        raise ValueError(f'{folder!r} has one class only ({classes[0]}), and a model needs two or more'
                         + _classes_below(folder, class_folders(folder)[0]))
    _warn_of_classes(folder, classes)
    for split in have:
        if hidden := folder_entries.hidden_folders(os.path.join(path, split)):
            logging.warning('%r: left out, since the name begins with a dot: %s with images; rename those that are '
                            'classes', os.path.join(path, split), few(hidden, 'folder'))
    trained = _places(folder)
    for split in have[1:] if 'train' in have else ():
        held_out = _places(os.path.join(path, split))
        if shared := [name for place, name in held_out.items() if place in trained]:
            logging.warning('%r: folders of %s/ are links to train/ or the reverse, their images are trained on, too: '
                            '%s', path, split, few(shared, 'class'))


def check_known(folder: str, classes: Sequence[str], known: Sequence[str]) -> None:
    """Checks the classes to evaluate on.

    Args:
      classes: names of folders in `folder`.
      known: names of the classes to train on, as `display_name`.

    Raises:
      ValueError: a class is not among them.
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
        near_by = [os.path.join(folder, name) for name in unknown[:folder_entries.LOOKED_AT]]
        places = [place for each in near_by if (place := _place_of(known, each))]
        hint = f'; the classes are in {places[0]!r}: move its folders up into {folder!r}' if places else ''
    raise ValueError(f'{folder!r} has {few(unknown, "class")} that train/ does not have: move or remove '
                     f'{"it" if len(unknown) == 1 else "them"}{hint}')


def check_labels(path: str, split: str, resolved: str, class_names: Sequence[str], labels: np.ndarray) -> None:
    """Warns of classes without an image in a split, and of folders that are not used.

    Args:
      split: requested split; `resolved`: see `splits.resolve`.

    Raises:
      ValueError: images of train/ are held out to evaluate on, and a class has no other ones.
    """
    counts = np.bincount(labels, minlength=len(class_names))
    missing = few([name for name, count in zip(class_names, counts) if not count], 'class')
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
    """Warns where all images of all classes are in folders below, and these have the same names in each class.

    Args:
      images: paths below `folder`, a split's.
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
                        few(sorted(shared), 'folder'))


def _check_annotations(folder: str, classes: Sequence[str]) -> None:
    """Raises a ValueError if all folders are those of images and of their annotations, as masks."""
    letters = {''.join(filter(str.isalpha, name.lower())): name for name in classes}
    images = sorted(letters.keys() & _IMAGES)
    if len(classes) > 1 and images and letters.keys() <= _IMAGES | _ANNOTATIONS:
        raise ValueError(f'{folder!r} holds folders of images and of annotations ({", ".join(classes)}) and not of '
                         f'classes{_classes_below(folder, letters[images[0]])}; if these are the classes, rename '
                         f'{letters[images[0]]!r}')


def _warn_of_classes(folder: str, classes: Sequence[str]) -> None:
    for one, other in lookalikes(classes):
        logging.warning('%r has two classes whose names differ only in case or spaces: %r and %r', folder, one, other)
    packed = [entry.name for entry in entries(folder) if entry.name.lower().endswith(_PACKED)]
    if packed := [name for name in packed if name not in classes]:
        logging.warning('%r holds %s: what is in them is not used, unpack or remove them', folder,
                        few(packed, 'packed file'))


def _warn_of_unused(path: str) -> None:
    if unused := [entry.name for entry in entries(path) if entry.is_dir() and entry.name != 'train']:
        logging.warning('%r has no folder %s with folders of classes, so a tenth of train/ is held out; not used: %s; '
                        'rename one that you mean to evaluate on', path, ' or '.join(splits.HELD_OUT),
                        few(unused, 'folder'))
    for file in (os.path.join(path, name) for name in splits.HELD_OUT):
        if os.path.isfile(file):
            logging.warning('%r is a file and no folder of images: it is not used', file)


def _way_out(path: str) -> str:
    """A hint for a path without train/; '' where nothing like a data set is near."""
    home, name = os.path.split(os.path.abspath(path))
    below = folders(path)
    if name in ('train', *splits.HELD_OUT) and any(has_image(os.path.join(path, each)) for each in below):
        return f'. This is the folder of a split: give --config.data.path={shlex.quote(home)}'
    if within := [each for each in below if os.path.isdir(os.path.join(path, each, 'train'))]:
        inner = shlex.quote(os.path.join(path, within[0]))
        return f'. {few(within, "folder")} in it with train/: give --config.data.path={inner}'
    if near := [each for each in below if each.strip().lower().startswith('train')]:
        return f'. Rename {near[0]!r} to train'
    if classes := [each for each in below if has_image(os.path.join(path, each))]:
        return (f'. {few(classes, "folder")} in it with images: if these are the classes, move them into '
                f'{os.path.join(path, "train")}; or make a new folder with a link named train to {path!r}, and give '
                'the new folder')
    return ''


def _classes_below(folder: str, name: str) -> str:
    """A hint for the only class `name` of a split's folder: the folders below it that look like the classes."""
    place = os.path.join(folder, name)
    below = folders(place)
    for _ in range(folder_entries.LEVELS):
        if len(below) == 1:
            place = os.path.join(place, below[0])
            below = folders(place)
    if 'train' in below:
        return f': the data set is one folder further down, give --config.data.path={shlex.quote(place)}'
    with_images = [each for each in below if has_image(os.path.join(place, each))]
    if len(with_images) < 2:
        return f': images are expected as {folder}/<class>/*.jpg'
    return (f'. The level below looks like the classes: {few(with_images, "folder")} in {place!r}: move them up into '
            f'{folder!r}')


def _places(folder: str) -> dict[Hashable, str]:
    """The class folders by their place on the disk.

    Raises:
      ValueError: two are one folder.
    """
    found: dict[Hashable, str] = {}
    for name in folders(folder):
        other = found.setdefault(folder_entries.identity(os.path.join(folder, name)), name)
        if other != name:
            raise ValueError(f'{folder!r}: the classes {other!r} and {name!r} are one folder: one is a link, remove it')
    return found


def _place_of(known: Sequence[str], folder: str) -> str:
    """The folder, or the one below it, whose folders are all known classes; '' where there is none."""
    for _ in range(folder_entries.LEVELS):
        below = folders(folder)
        if below and {display_name(name) for name in below} <= set(known):
            return folder
        if len(below) != 1:
            return ''
        folder = os.path.join(folder, below[0])
    return ''
