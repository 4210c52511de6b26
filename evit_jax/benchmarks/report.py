"""Output of measurements: tables for the terminal and Markdown, and JSON with a description of the machine."""

import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

from evit_jax.runtime import storage

_PACKAGES = ('jax', 'jaxlib', 'flax', 'grain', 'numpy', 'Pillow', 'simplejpeg')


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats an aligned table. The first column is flush left, the others are flush right."""
    widths = [max(len(row[column]) for row in (headers, *rows)) for column in range(len(headers))]
    lines = ['  '.join(cell.ljust(width) if column == 0 else cell.rjust(width)
                       for column, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in (headers, *rows)]
    return '\n'.join([lines[0], '-' * max(map(len, lines)), *lines[1:]])


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table in Markdown."""
    lines = [headers, ['---', *['---:'] * (len(headers) - 1)], *rows]
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def check_writable(flag: str, file: str | os.PathLike | None) -> None:
    """Raises a ValueError if the file named by a flag cannot be written. Creates its folder, but not the file."""
    if not file:
        return
    path, label, way_out = pathlib.Path(file), f'{flag}={file}', 'name a file in a folder that you may write'
    if not path.exists():
        storage.make_writable(path.parent, label, way_out)
    elif path.is_dir() or not os.access(path, os.W_OK):
        reason = 'it is a folder' if path.is_dir() else 'it is read-only'
        raise ValueError(f'{label} cannot be written ({reason}): {way_out}')


def num_cpus() -> int:
    """Returns the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def machine() -> dict[str, Any]:
    """Returns a description of the machine, the date and the versions of packages, for JSON."""
    return {'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'), 'system': platform.platform(),
            'processor': processor(), 'cpus': num_cpus(), 'python': platform.python_version(),
            'versions': {name: importlib.metadata.version(name) for name in _PACKAGES}}


def write_json(file: str | os.PathLike, measurement: dict[str, Any]) -> None:
    """Writes a measurement and a description of the machine as JSON. Numbers that are not finite become null.

    Raises:
      OSError: the file cannot be written.
    """
    path = pathlib.Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_without_nan({'machine': machine()} | measurement), indent=1, allow_nan=False) + '\n')


def _without_nan(value: Any) -> Any:
    """Replaces numbers that JSON cannot express by None."""
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def processor() -> str:
    """Returns the model name of the CPU."""
    info = pathlib.Path('/proc/cpuinfo')
    models = [line.partition(':')[2].strip() for line in info.read_text().splitlines()
              if line.startswith('model name')] if info.exists() else []
    return models[0] if models else platform.processor()
