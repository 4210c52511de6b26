"""The files of an evaluation: a JSON result and a picture next to it."""

import datetime
import errno
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from evit_jax import models
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.data import fingerprint
from evit_jax.data.sources import Source, split_of
from evit_jax.metrics import writers
from evit_jax.models.config import ViTConfig
from evit_jax.reduction.plan import TokenPlan
from evit_jax.runtime import storage

_COMPARED = ('workdir', 'model', 'data', 'preprocessing')  # a result is overwritten only if these parts are equal
_MAX_NAME = 200  # file systems allow 255 bytes, with prefix and suffix
_PACKAGES = ('jax', 'flax', 'numpy')


class Files(NamedTuple):
    """Paths of the result file and of the picture."""

    result: epath.Path
    picture: epath.Path
    required: bool  # True: a file that cannot be written is an error; False: a warning
    named: bool     # True: the user named the result file, so it may be overwritten

    def without_conflict(self, result: dict[str, Any]) -> 'Files':
        """Returns these paths, or other paths if the file contains a result for other data or preprocessing."""
        keys = _COMPARED if self.required else _COMPARED[1:]  # a workdir contains only results of its own run
        if self.named or not (differences := _differences(self.result, result, keys)):
            return self
        digest = fingerprint.digest(*(json.dumps(result[key], sort_keys=True) for key in keys))
        path = self.result.with_name(f'{self.result.stem}_{digest}.json')
        logging.warning('%s holds the result of another evaluation (%s) and is kept: this result is written to %s',
                        self.result, ', '.join(differences), path.name)
        return self._replace(result=path, picture=path.with_suffix('.png'))

    def write(self, result: dict[str, Any], picture: bytes | None) -> None:
        """Writes the result and, if given, the picture.

        Raises:
          OSError, ValueError: a required file cannot be written.
        """
        files = self.without_conflict(result)
        content = json.dumps(writers.to_json(result | _environment()), indent=1, allow_nan=False) + '\n'
        try:
            with storage.explain_bucket_errors(files.result):
                storage.write_atomic(files.result, content.encode())
                if picture is not None:
                    storage.write_atomic(files.picture, picture)
        except (OSError, ValueError) as error:
            if files.required:
                raise
            logging.warning('%s cannot be written (%s), so the result is only in this log; give another path with '
                            '--out', files.result, getattr(error, 'strerror', None) or error)
            return
        logging.info('written: %s', ', '.join(map(str, (files.result, files.picture)[:1 if picture is None else 2])))


def files_of(workdir: str | os.PathLike, plan: TokenPlan, out: str | os.PathLike | None,
             kind: str = 'evaluate') -> Files:
    """Returns the files of an evaluation under a plan.

    Args:
      out: a file name that ends in .json, or a folder; None: the workdir.
      kind: first part of the file name.
    """
    named = bool(out) and _is_file_name(out)
    result = storage.as_path(out) if named else storage.as_path(out or workdir) / f'{kind}-{plan_name(plan)}.json'
    return Files(result, result.with_suffix('.png'), bool(out), named)


def check_out(out: str | os.PathLike | None) -> None:
    """Creates the folder for `--out` and checks that it can be written.

    Raises:
      ValueError: the folder cannot be written, or `--out` is neither a .json file nor a folder.
    """
    if not out:
        return
    path = storage.as_path(out)
    folder = path.parent if _is_file_name(out) else path
    if path.suffix and folder == path and not os.fspath(out).endswith('/') and not path.is_dir():
        raise ValueError(f'--out={out} is neither a file that ends in .json nor a folder that exists: name a file that '
                         'ends in .json, or make the folder first')
    way_out = 'name a file that ends in .json, or a folder, where you may write'
    if _is_file_name(out) and path.is_dir():
        raise ValueError(f'--out={out} cannot be written ({os.strerror(errno.EISDIR)}): {way_out}')
    storage.make_writable(folder, f'--out={out}', way_out)


def _is_file_name(out):
    return os.fspath(out).endswith('.json')


def plan_name(plan: TokenPlan) -> str:
    """Returns a file name for a plan: the reducer, the number of patches, and the numbers of kept and dropped tokens.

    Examples: 'dense-64' (no reductions), 'evit-64-45at0-32at2-fused', 'tome-64-each-60-56-52' (every block reduces),
    'prune_merge-64-each-60-56-drop-3-0' (3 tokens are dropped in block 0). A digest replaces the end of a long name.
    """
    if not plan.reductions:
        return f'dense-{plan.patches}'
    kept = [f'{plan.keep[block]}at{block}' for block in plan.reductions]
    if None not in plan.keep:
        kept = ['each', *map(str, plan.keep)]
    dropped = ['drop', *map(str, plan.dropped)] if plan.dropped else []
    name = '-'.join([plan.reducer.name.replace(':', '-'), str(plan.patches), *kept, *dropped, *['fused'] * plan.fused])
    return name if len(name) <= _MAX_NAME else f'{name[:_MAX_NAME - 17]}-{fingerprint.digest(name)}'


def describe(config: Mapping[str, Any], model_config: ViTConfig, plan: TokenPlan, source: Source) -> dict[str, Any]:
    """Describes model, plan, data and preprocessing of an evaluation as JSON types, for its result.

    Args:
      config: flat config of the evaluation.
      source: the evaluated images.
    """
    return {
        'model': {'name': config['model.name'], 'dtype': config['model.dtype']} | {
            key: getattr(model_config, key) for key in ('classes', 'distilled', *models.NOT_IN_SHAPES)},
        'plan': {'name': plan_name(plan), 'description': str(plan), 'reducer': plan.reducer.name,
                 'patches': plan.patches, 'reduce_at': list(plan.reductions),
                 'tokens': list(plan.tokens), 'drop': list(plan.dropped), 'fused': plan.fused},
        'data': {'source': config['data.source'], 'path': config['data.path'],
                 'name': config['data.name'] if config['data.source'] == 'tfds' else '',
                 'split': split_of(source, config['data.test_split']), 'images': len(source)},
        'preprocessing': {'image_size': models.image_size_of(config), 'mean': list(config['data.mean']),
                          'std': list(config['data.std']), 'eval_crop': config['data.eval_crop'],
                          'interpolation': config['data.interpolation']}}


def _differences(file, result, keys):
    """Returns the values that differ from those of an earlier result; an empty list if there is no readable result."""
    try:
        with storage.explain_bucket_errors(file):
            old = json.loads(file.read_bytes())
        old, new = (workdirs.flat({key: values[key] for key in keys}) for values in (old, result))
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [f'{key} {old[key]} there, {new[key]} here' for key in old if key in new and old[key] != new[key]]


def _environment():
    return {'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
            'python': platform.python_version(),
            'versions': {name: importlib.metadata.version(name) for name in _PACKAGES}}
