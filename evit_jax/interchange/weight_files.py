"""Opens the weights of other programs: PyTorch and safetensors files, shards, and Hugging Face or timm folders."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging

from evit_jax.interchange import safetensors_file, torch_file
from evit_jax.interchange.restricted_pickle import printable

CONFIG, PREPROCESSOR = 'config.json', 'preprocessor_config.json'
_INDEXES = 'model.safetensors.index.json', 'pytorch_model.bin.index.json'
WEIGHTS = 'model.safetensors', _INDEXES[0], 'pytorch_model.bin', _INDEXES[1]  # the first has precedence
_FOREIGN = {'flax_model.msgpack': 'from_flax', 'tf_model.h5': 'from_tf'}  # file -> argument of from_pretrained
_MAX_NAME = 255  # bytes of a file name
_SUFFIXES = '.safetensors', '.bin', '.pth', '.pt', '.ckpt'


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """Opens a file of weights and yields (contents, metadata). The format is detected by the first bytes.

    The contents are nested dicts of `LazyArray`s, which can be read only inside the `with` block. The metadata are
    those of a safetensors file; {} for PyTorch.

    Args:
      path: a file of weights, or an index of shards (*.index.json).

    Raises:
      ValueError: the format is not supported, or the file is damaged or refused.
    """
    if path.name.endswith('.index.json'):
        with _opened_shards(path) as contents:
            yield contents
        return
    with open(path, 'rb') as file:
        start = file.read(16)
    if torch_file.is_torch_file(start, path):
        with torch_file.opened(path) as tree:
            yield tree, {}
    elif start[8:9] == b'{':
        with safetensors_file.opened(path) as contents:
            yield contents
    else:
        raise ValueError(f'{path} is neither a PyTorch checkpoint (.pth, .pt) nor safetensors: it begins with '
                         f'{start[:8]!r}' if start else f'{path} is empty')


def find_weights(folder: pathlib.Path) -> pathlib.Path:
    """Returns the path of the weights, or of the index of their shards, in a Hugging Face or timm folder.

    Raises:
      ValueError: the folder has no weights. The message lists possible files.
    """
    candidates = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not candidates:
        others = sorted(file.name for file in folder.iterdir() if file.suffix in _SUFFIXES)
        foreign = [name for name in _FOREIGN if (folder / name).is_file()]
        way_out = (f'give one of its files: {", ".join(others[:6])}' if others else
                   f'its weights are in {foreign[0]}, which is not supported: with transformers 4, save them again: '
                   f"ViTForImageClassification.from_pretrained('{folder}', {_FOREIGN[foreign[0]]}=True)."
                   "save_pretrained('NEW')" if foreign else 'it holds no file of weights')
        raise ValueError(f'{folder} is neither the workdir of a run (its config.json has no model.name) nor a Hugging '
                         f'Face folder (no {" or ".join(WEIGHTS)}): {way_out}')
    if len(candidates) > 1:
        logging.info('%s holds %s: took the first', folder, ', '.join(file.name for file in candidates))
    return candidates[0]


def holds_weights(folder: pathlib.Path) -> bool:
    """Returns True if a folder contains a file of PyTorch or safetensors weights."""
    return any(file.suffix in _SUFFIXES for file in folder.iterdir())


@contextlib.contextmanager
def _opened_shards(index):
    """Opens all shards that an index lists, and yields (arrays, metadata). The first metadata found are used."""
    file_of_array = _read_index(index)
    if absent := sorted(file for file in set(file_of_array.values()) if not (index.parent / file).is_file()):
        raise ValueError(f'{index} lists {len(set(file_of_array.values()))} shards, but {", ".join(absent)} is not '
                         'there: download all of them')
    arrays, metadata = {}, {}
    with contextlib.ExitStack() as stack:
        for file in sorted(set(file_of_array.values())):
            shard, shard_metadata = stack.enter_context(opened(index.parent / file))
            listed = {name for name in file_of_array if file_of_array[name] == file}
            present = set(shard if isinstance(shard, dict) else ())
            if differ := sorted(map(str, listed ^ present)):
                raise ValueError(f'{index} and its shard {file} do not match: {len(listed - present)} listed arrays '
                                 f'are missing, {len(present - listed)} present arrays are not listed, such as '
                                 f'{printable(differ[0])}: download both again')
            arrays.update(shard)
            metadata = metadata or shard_metadata
        yield arrays, metadata


def shards(index: pathlib.Path) -> list[str]:
    """Returns the names of the files that an index of shards lists.

    Raises:
      ValueError: the index is damaged, or lists a file outside its folder.
    """
    return sorted(set(_read_index(index).values()))


def _read_index(index):
    """Returns the `weight_map` of an index. It maps an array name to a file name in the same folder."""
    files = read_json(index).get('weight_map')
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f'{index} lists no shards (weight_map): download it again')
    for file in files.values():
        if (file != pathlib.PurePosixPath(file).name or '\\' in file or file in ('', '.', '..')
                or not file.isprintable() or len(file.encode()) > _MAX_NAME):
            raise ValueError(f'{index} names {printable(file)!r}, which is no file of its folder: it is damaged '
                             'or malicious')
    return files


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads the dict in a JSON file.

    Raises:
      ValueError: the file is not JSON, or holds another type.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8-sig'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not JSON ({error}): restore it, or move it away') from error
    if not isinstance(content, dict):
        raise ValueError(f'{path} holds a {type(content).__name__}, not a JSON object: restore it, or move it away')
    return content


def read_configs(weights: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Reads the Hugging Face or timm configs in the folder of a file of weights.

    Returns:
      A dict from file name to content. A config.json that belongs to a run of this project is skipped.
    """
    configs = {name: read_json(weights.parent / name) for name in (CONFIG, PREPROCESSOR)
               if (weights.parent / name).is_file()}
    return {name: content for name, content in configs.items() if 'model.name' not in content}


def class_names(config: Mapping[str, Any]) -> list[str]:
    """Returns the class names in a config.json, ordered by label; [] if there are only placeholders (LABEL_0) or none.
    """
    timm = config.get('pretrained_cfg')
    names = config.get('label_names') or (timm.get('label_names') if isinstance(timm, dict) else None)
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return names
    labels = config.get('id2label')
    if not isinstance(labels, dict) or not labels:
        return []
    if {*labels} != {*map(str, range(len(labels)))}:
        logging.warning('id2label of %s does not number its %d classes from 0; ignored', CONFIG, len(labels))
        return []
    names = [labels[str(label)] for label in range(len(labels))]
    names = [str(name) if type(name) is int else name for name in names]
    if others := [type(name).__name__ for name in names if not isinstance(name, str)]:
        logging.warning('id2label of %s names a class by a %s, not by text; ignored', CONFIG, others[0])
        return []
    return [] if all(name == f'LABEL_{label}' for label, name in enumerate(names)) else names
