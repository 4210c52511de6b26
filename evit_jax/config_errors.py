"""Wrong words about a config on the command line: named with what is meant, before the flags are parsed."""

import difflib
import glob
import math
import os
import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

_NEAR = 0.5         # least similarity, in 0..1, of a name that is offered as a hint
_FOLDER = 'configs'  # folder of the recipes in a checkout
_BASE = pathlib.Path(__file__).parents[1] / _FOLDER / 'base.py'  # has every key of a run
_KINDS = {bool: ('true or false', flags.BooleanParser()), int: ('a whole number', flags.IntegerParser()),
          float: ('a number', flags.FloatParser())}


def check(arguments: Sequence[str], defined: flags.FlagValues) -> None:
    """Raises an error where `--config` names no config, or a `--config.key` none of its keys, or has a wrong type.

    Args:
      arguments: the command line.
      defined: the flags; without a config flag among them nothing is checked.

    Raises:
      FileNotFoundError: there is no such file; names the nearest, and those that there are.
      ValueError: the file is no config, lacks keys, or is given twice; an unknown key, a group, or a value of a wrong
        type.
    """
    if 'config' not in defined or not isinstance(defined['config'].parser, ConfigFileFlagParser):
        return
    before, file, overrides = _words(defined.read_flags_from_files(list(arguments), force_gnu=False))
    if file is None:
        if before:
            raise ValueError(f'{before[0]} changes a config: give --config FILE before it')
        return
    if before:
        raise ValueError(f'{before[0]} stands before --config: give --config={file} first')
    config = _load(file)
    _check_keys(file, config)
    for name, text in overrides:
        _check_value(name, _find(config, name), text)


def nearest(name: str, known: Sequence[str], before: str = '') -> str:
    """'did you mean ...? ' with the known name that is most like this one; nothing where none is like it."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=_NEAR)
    return f'did you mean {before}{near[0]}? ' if near else ''


def _words(arguments):
    """Overrides before `--config`, its file, and (key, text or None) of the overrides behind it.

    Raises:
      ValueError: there are two files.
    """
    before, file, overrides = [], None, []
    for number, word in enumerate(arguments[1:], 1):
        if word == '--':
            break
        if found := re.fullmatch(r'--?config(?:=(.*))?', word, re.DOTALL):
            first, file = file, found[1] if '=' in word else ' '.join(arguments[number + 1:number + 2])
            if first is not None:
                raise ValueError(f'--config is given twice, as {first} and as {file}: give one of them')
        elif found := re.fullmatch(r'--?(?:no)?config\.([^=]+)(?:=(.*))?', word, re.DOTALL):
            overrides.append(found.groups())
            before += [word] if file is None else []
    return before, file, overrides


def _check_file(file: str) -> None:
    path = file.split(':', 1)[0]
    if os.path.isfile(path):
        return
    folders = [folder for folder in (os.path.dirname(path), _FOLDER) if folder]
    known = sorted({name for folder in folders for name in glob.glob(os.path.join(glob.escape(folder), '*.py'))})
    stems = {os.path.basename(name).removesuffix('.py'): name for name in known}
    near = difflib.get_close_matches(os.path.basename(path).removesuffix('.py'), stems, n=1, cutoff=_NEAR)
    hint = f'did you mean {shlex.quote(stems[near[0]])}? ' if near else ''
    there = f'there are {", ".join(known)}' if known else f'and none in the folder {_FOLDER}/ of the current directory'
    kind = 'a folder' if os.path.isdir(path) else 'no file'
    raise FileNotFoundError(f'--config={file} is {kind}: {hint}{there}')


def _load(file: str) -> Any:
    """The config of a file.

    Raises:
      FileNotFoundError, ValueError: there is none, or it fails.
    """
    _check_file(file)
    if file.endswith('.json'):
        raise ValueError(f'--config={file} is JSON, and a config is a Python file with get_config(), such as those in '
                         f'{_FOLDER}/*.py: give the one that the run was started with. --mode=evaluate needs none')
    try:
        config = ConfigFileFlagParser('config').parse(file)
        getattr(config, 'keys', None)  # an error that was kept for the first use is raised here
        return config
    except Exception as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        raise ValueError(f'--config={file} fails: {type(error).__name__}: {lines[-1].strip()}') from error


def _check_keys(file: str, config: Any) -> None:
    """Raises a ValueError where a config lacks keys of the base config, or the runs of a comparison do."""
    if not isinstance(config, ConfigDict):
        raise ValueError(f'--config={file}: get_config() returns {type(config).__name__} and not ConfigDict: begin '
                         f'with base.get_config() of {_FOLDER}/base.py')
    if not _BASE.is_file():  # there are recipes in a checkout only
        return
    compared, path = (config.run, 'config.run') if isinstance(config.get('run'), ConfigDict) else (config, 'config')
    if missing := _missing(ConfigFileFlagParser('base').parse(str(_BASE)), compared, path):
        raise ValueError(f'--config={file} lacks {", ".join(missing)}: begin with base.get_config() of '
                         f'{_FOLDER}/base.py, and change what differs')


def _missing(base: ConfigDict, config: ConfigDict, path: str) -> list[str]:
    """Dotted keys and groups of the base config that a config lacks."""
    found = []
    for key, value in base.items():
        group = isinstance(value, ConfigDict)
        if key not in config or (group and not isinstance(config[key], ConfigDict)):
            found.append(f'{path}.{key}')
        elif group:
            found += _missing(value, config[key], f'{path}.{key}')
    return found


def _find(config: Any, name: str) -> Any:
    """The value of a dotted key.

    Raises:
      ValueError: there is none; names the nearest key, and all of that group.
    """
    group, path = config, 'config'
    for key in name.split('.'):
        if '[' in key:
            return None  # ml_collections checks lists
        if not isinstance(group, ConfigDict):
            raise ValueError(f'--config.{name}: {path} is a value, and has no key {key!r}: give --{path}=...')
        if key not in group:
            raise ValueError(f'unknown key {path}.{key}: {_hint(config, group, path, key)}{path} has '
                             f'{", ".join(group)}')
        group, path = group[key], f'{path}.{key}'
    if isinstance(group, ConfigDict):
        raise ValueError(f'{path} is a group of keys and no value: give one of them, as '
                         f'--{path}.{next(iter(group), "key")}=...; it has {", ".join(group)}')
    return group


def _hint(config, group, path, key):
    """The nearest key of the group, and those of this very name elsewhere."""
    near = [f'{path}.{name}' for name in difflib.get_close_matches(key, group, n=1, cutoff=_NEAR)]
    same = [f'config.{name}' for name in _keys(config) if name.split('.')[-1] == key]
    return f'did you mean {" or ".join(near + same)}? ' if near + same else ''


def _keys(group: ConfigDict, before: str = '') -> list[str]:
    return [name for key, value in group.items() for name in (
        _keys(value, f'{before}{key}.') if isinstance(value, ConfigDict) else [before + key])]


def _check_value(name: str, default: Any, text: str | None) -> None:
    """Raises a ValueError where the text is no value of the default's type."""
    if text is None:
        return
    wanted, parser = _KINDS.get(type(default), ('', None))
    try:
        if parser and math.isnan(parser.parse(text)):
            raise ValueError(text)
        if isinstance(default, tuple):
            wanted = 'a list of numbers, as 0.9,0.7'
            [float(part) for part in re.split(r'[,\s]+', text.strip().strip('()[]')) if part]
    except (ValueError, TypeError):
        raise ValueError(f'--config.{name}={text} is not {wanted}; the config has {default}') from None
