"""What measurements have in common: a table on the screen, and JSON that says on which machine it was."""

import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

_PACKAGES = ('jax', 'jaxlib', 'flax', 'grain', 'numpy', 'Pillow', 'simplejpeg')


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (headers, *rows)) for column in range(len(headers))]
    lines = ['  '.join(cell.ljust(width) if column == 0 else cell.rjust(width)
                       for column, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in (headers, *rows)]
    return '\n'.join([lines[0], '-' * max(map(len, lines)), *lines[1:]])


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same for a Markdown file."""
    lines = [headers, ['---', *['---:'] * (len(headers) - 1)], *rows]
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def check_writable(flag: str, file: str | os.PathLike | None) -> None:
    """Raises a ValueError if a file that a flag names cannot be written; makes its folder."""
    if not file:
        return
    path = pathlib.Path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        path.open('a').close()
        if not there:
            path.unlink()
    except OSError as error:
        raise ValueError(f'{flag}={file} cannot be written ({error.strerror}): name a file in a folder that you may '
                         'write') from error


def cpus() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def machine() -> dict[str, Any]:
    """Where and when something was measured, and with which versions."""
    return {'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'), 'system': platform.platform(),
            'processor': processor(), 'cpus': cpus(), 'python': platform.python_version(),
            'versions': {name: importlib.metadata.version(name) for name in _PACKAGES}}


def write_json(file: str | os.PathLike, measured: dict[str, Any]) -> None:
    """Writes what was measured, with the machine; null stands for a number that is not finite.

    Raises:
      OSError: the file cannot be written.
    """
    path = pathlib.Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_without_nan({'machine': machine()} | measured), indent=1, allow_nan=False) + '\n')


def _without_nan(value: Any) -> Any:
    """The value with None for each number in it that JSON has no sign for."""
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def processor() -> str:
    info = pathlib.Path('/proc/cpuinfo')
    models = [line.partition(':')[2].strip() for line in info.read_text().splitlines()
              if line.startswith('model name')] if info.exists() else []
    return models[0] if models else platform.processor()
