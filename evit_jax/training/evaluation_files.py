"""The files of an evaluation: its result as JSON, and a picture beside it."""

import datetime
import errno
import importlib.metadata
import json
import os
import platform
import uuid
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from evit_jax.checkpoints import workdir as workdirs
from evit_jax.data import fingerprint
from evit_jax.metrics import writers
from evit_jax.reduction.plan import TokenPlan
from evit_jax.runtime import storage

_COMPARED = ('workdir', 'model', 'data', 'preprocessing')  # parts that results in one file share
_PACKAGES = ('jax', 'flax', 'numpy')


class Files(NamedTuple):
    """Paths of the result and of the picture."""

    result: epath.Path
    picture: epath.Path
    required: bool  # a file that cannot be written is an error, and not a warning
    named: bool     # the user has named the file of the result, which may be overwritten

    def apart(self, result: dict[str, Any]) -> 'Files':
        """The same paths, or others beside them where the file there is of other data or preprocessing."""
        keys = _COMPARED if self.required else _COMPARED[1:]  # a workdir holds results of its own run
        if self.named or not (differ := _differences(self.result, result, keys)):
            return self
        digest = fingerprint.digest(*(json.dumps(result[key], sort_keys=True) for key in keys))
        path = self.result.with_name(f'{self.result.stem}_{digest}.json')
        logging.warning('%s is kept, as it is of another evaluation (%s): this one is written to %s', self.result,
                        ', '.join(differ), path.name)
        return self._replace(result=path, picture=path.with_suffix('.png'))

    def write(self, result: dict[str, Any], picture: bytes | None) -> None:
        """Writes both, or the result alone.

        Raises:
          OSError, ValueError: a required file cannot be written.
        """
        self = self.apart(result)
        content = json.dumps(writers.to_json(result | _origin()), indent=1, allow_nan=False) + '\n'
        try:
            with storage.explain_bucket_errors(self.result):
                storage.write_atomic(self.result, content.encode())
                if picture is not None:
                    storage.write_atomic(self.picture, picture)
        except (OSError, ValueError) as error:
            if self.required:
                raise
            logging.warning('%s cannot be written (%s): the result above is not kept; name a place for it with --out',
                            self.result, getattr(error, 'strerror', None) or error)
            return
        logging.info('written: %s', ', '.join(map(str, (self.result, self.picture)[:1 if picture is None else 2])))


def files_of(workdir: str | os.PathLike, plan: TokenPlan, out: str | os.PathLike | None) -> Files:
    """The files of an evaluation under a plan.

    Args:
      out: a file that ends in .json, or a folder; None: the workdir.
    """
    named = bool(out) and _is_file_name(out)
    result = storage.as_path(out) if named else storage.as_path(out or workdir) / f'evaluate-{plan_name(plan)}.json'
    return Files(result, result.with_suffix('.png'), bool(out), named)


def check_out(out: str | os.PathLike | None) -> None:
    """Raises a ValueError where the place in `--out` cannot be written; makes its folder."""
    if not out:
        return
    path = storage.as_path(out)
    folder = path.parent if _is_file_name(out) else path
    if path.suffix and folder == path and not os.fspath(out).endswith('/') and not path.is_dir():
        raise ValueError(f'--out={out} is neither a file that ends in .json nor a folder that exists: name a file that '
                         'ends in .json, or make the folder first')
    probe = folder / f'.{uuid.uuid4().hex[:8]}.probe'
    try:
        if _is_file_name(out) and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with storage.explain_bucket_errors(out):
            folder.mkdir(parents=True, exist_ok=True)
            storage.write_atomic(probe, b'')
            probe.unlink()
    except OSError as error:
        raise ValueError(f'--out={out} cannot be written ({error.strerror or error}): name a file that ends in .json, '
                         'or a folder, where you may write') from error


def _is_file_name(out):
    return os.fspath(out).endswith('.json')


def plan_name(plan: TokenPlan) -> str:
    """A plan for the name of a file: 'dense-64' where nothing is dropped, or method, patches, and tokens by block.

    As in 'evit-64-45at0-32at2-fused', or, where every block reduces, 'tome-64-each-60-56-52'.
    """
    if not plan.reductions:
        return f'dense-{plan.patches}'
    kept = [f'{plan.keep[block]}at{block}' for block in plan.reductions]
    if None not in plan.keep:
        kept = ['each', *map(str, plan.keep)]
    return '-'.join([plan.reducer.name, str(plan.patches), *kept, *['fused'] * plan.fused])


def _differences(file, result, keys):
    """The values in an earlier result that the new one does not share; none where no result can be read."""
    try:
        with storage.explain_bucket_errors(file):
            old = json.loads(file.read_bytes())
        old, new = (workdirs.flat({key: of[key] for key in keys}) for of in (old, result))
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [f'{key} {old[key]} there, {new[key]} here' for key in old if key in new and old[key] != new[key]]


def _origin():
    return {'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
            'python': platform.python_version(),
            'versions': {name: importlib.metadata.version(name) for name in _PACKAGES}}
