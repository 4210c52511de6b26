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

from evit_jax.tokens.plan import TokenPlan
from evit_jax.training import storage, writers

_PACKAGES = ('jax', 'flax', 'numpy')


class Files(NamedTuple):
    """Paths of the result and of the picture."""

    result: epath.Path
    picture: epath.Path
    required: bool  # a file that cannot be written is an error, and not a warning

    def write(self, result: dict[str, Any], picture: bytes | None) -> None:
        """Writes both, or the result alone.

        Raises:
          OSError, ValueError: a required file cannot be written.
        """
        content = json.dumps(writers.to_json(result | _origin()), indent=1, allow_nan=False) + '\n'
        try:
            with storage.reaching(self.result):
                storage.write_whole(self.result, content.encode())
                if picture is not None:
                    storage.write_whole(self.picture, picture)
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
    if out and _is_file_name(out):
        result = storage.place(out)
    else:
        result = storage.place(out or workdir) / f'evaluate-{plan_name(plan)}.json'
    return Files(result, result.with_suffix('.png'), bool(out))


def check_out(out: str | os.PathLike | None) -> None:
    """Raises a ValueError where the place in `--out` cannot be written; makes its folder."""
    if not out:
        return
    path = storage.place(out)
    folder = path.parent if _is_file_name(out) else path
    probe = folder / f'.{uuid.uuid4().hex[:8]}.probe'
    try:
        if _is_file_name(out) and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with storage.reaching(out):
            folder.mkdir(parents=True, exist_ok=True)
            storage.write_whole(probe, b'')
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


def _origin():
    return {'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
            'python': platform.python_version(),
            'versions': {name: importlib.metadata.version(name) for name in _PACKAGES}}
