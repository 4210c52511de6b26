"""Folders of Hugging Face and timm: weights in one file or in shards, and configs beside them."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import logging

from evit_jax.interchange.pickles import shown

CONFIG, PREPROCESSOR = 'config.json', 'preprocessor_config.json'
_INDEXES = 'model.safetensors.index.json', 'pytorch_model.bin.index.json'
_WEIGHTS = 'model.safetensors', _INDEXES[0], 'pytorch_model.bin', _INDEXES[1]  # the first that is there counts
_FOREIGN = {'flax_model.msgpack': 'from_flax', 'tf_model.h5': 'from_tf'}  # -> the argument that reads it
_SUFFIXES = '.safetensors', '.bin', '.pth', '.pt', '.ckpt'


def weights_in(folder: pathlib.Path) -> pathlib.Path:
    """The file of weights, or the index of its shards, in a folder.

    Raises:
      ValueError: there is none; lists files that may be meant.
    """
    found = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    if not found:
        others = sorted(file.name for file in folder.iterdir() if file.suffix in _SUFFIXES)
        foreign = [name for name in _FOREIGN if (folder / name).is_file()]
        more = (f'give one of its files: {", ".join(others[:6])}' if others else
                f'its weights are in {foreign[0]}, which is not read here: with transformers 4, save them again: '
                f"ViTForImageClassification.from_pretrained('{folder}', {_FOREIGN[foreign[0]]}=True)."
                "save_pretrained('NEW')" if foreign else 'it holds no file of weights at all')
        raise ValueError(f'{folder} is neither the workdir of a run (its config.json names no model.name) nor a folder '
                         f'of Hugging Face (no {" or ".join(_WEIGHTS)}): {more}')
    if len(found) > 1:
        logging.info('%s holds %s: took the first', folder, ', '.join(file.name for file in found))
    return found[0]


def is_index(path: pathlib.Path) -> bool:
    """True for a file that lists shards."""
    return path.name.endswith('.index.json')


@contextlib.contextmanager
def opened_shards(index: pathlib.Path, opened: Callable) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """The arrays of all shards that an index lists, and the metadata of the first.

    Args:
      opened: opens one file, as `files.opened`.

    Raises:
      ValueError: the index is damaged or names a path outside of its folder, or shards are missing or hold other
        arrays than it lists.
    """
    files = _files_of(index)
    if absent := sorted(file for file in set(files.values()) if not (index.parent / file).is_file()):
        raise ValueError(f'{index} lists {len(set(files.values()))} shards, and {", ".join(absent)} is not there: '
                         'download all of them')
    arrays, metadata = {}, {}
    with contextlib.ExitStack() as stack:
        for file in sorted(set(files.values())):
            tree, said = stack.enter_context(opened(index.parent / file))
            listed, held = {name for name in files if files[name] == file}, set(tree if isinstance(tree, dict) else ())
            if differ := sorted(map(str, listed ^ held)):
                raise ValueError(f'{index} and its shard {file} do not fit each other: {len(listed - held)} arrays are '
                                 f'listed and not there, {len(held - listed)} are there and not listed, as '
                                 f'{shown(differ[0])}: download both again')
            arrays.update(tree)
            metadata = metadata or said
        yield arrays, metadata


def _files_of(index):
    """Array -> file name, of an index."""
    files = read_json(index).get('weight_map')
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f'{index} lists no shards (weight_map): download it again')
    for file in files.values():
        if file != pathlib.PurePosixPath(file).name or '\\' in file or file in ('', '.', '..'):
            raise ValueError(f'{index} names {shown(file)!r}, which is no file of its folder: it is damaged or made up')
    return files


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The dict in a JSON file.

    Raises:
      ValueError: it holds none.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8-sig'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is no JSON ({error}): restore it, or move it away') from error
    if not isinstance(content, dict):
        raise ValueError(f'{path} holds a {type(content).__name__}, not a JSON object: restore it, or move it away')
    return content


def configs_beside(weights: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The configs of Hugging Face or timm in the folder of a file of weights, by file name."""
    found = {name: read_json(weights.parent / name) for name in (CONFIG, PREPROCESSOR)
             if (weights.parent / name).is_file()}
    return {name: content for name, content in found.items() if 'model.name' not in content}  # a run's own is none


def class_names(config: Mapping[str, Any]) -> list[str]:
    """The names of the classes in a config, by label; [] where it has none, or no more than placeholders."""
    inner = config.get('pretrained_cfg')
    names = config.get('label_names') or (inner.get('label_names') if isinstance(inner, dict) else None)
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return names
    labels = config.get('id2label')
    if not isinstance(labels, dict) or not labels:
        return []
    if {*labels} != {*map(str, range(len(labels)))}:
        logging.warning('id2label of %s does not number its %d classes from 0, and is left out', CONFIG, len(labels))
        return []
    names = [labels[str(label)] for label in range(len(labels))]
    names = [str(name) if type(name) is int else name for name in names]
    if others := [type(name).__name__ for name in names if not isinstance(name, str)]:
        logging.warning('id2label of %s names a class by a %s, not by text, and is left out', CONFIG, others[0])
        return []
    return [] if all(name == f'LABEL_{label}' for label, name in enumerate(names)) else names
