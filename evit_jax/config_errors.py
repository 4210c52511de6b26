"""Finds recipes by name, and explains errors in `--config` and `--config.key` before the flags are parsed."""

import ast
import glob
import math
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from evit_jax.configs import FOLDER
from evit_jax.configs.base import KEYS
from evit_jax.runtime.names import nearest_name

BASE = FOLDER / 'base.py'  # file with the defaults of all keys
_SIMILARITY = 0.5          # minimal similarity of a suggested name, in 0..1
_TYPES = {bool: ('true or false', flags.BooleanParser()), int: ('a whole number', flags.IntegerParser()),
          float: ('a number', flags.FloatParser())}


def resolve(arguments: Sequence[str], defined: flags.FlagValues) -> list[str]:
    """Replaces the name of a recipe (`--config digits`) by its file. Checks the config and its overrides.

    Args:
      arguments: the command line.
      defined: the flags of the program. If there is no config flag, the arguments are returned unchanged.

    Raises:
      FileNotFoundError: there is no such file or recipe. The message gives the nearest name and all recipes.
      ValueError: the file is not a config, lacks keys, or is given twice; or an override has an unknown key, a group
        instead of a key, or a value of the wrong type.
    """
    if 'config' not in defined or not isinstance(defined['config'].parser, ConfigFileFlagParser):
        return list(arguments)
    arguments = defined.read_flags_from_files(list(arguments), force_gnu=False)
    arguments, file, early, overrides = _split(arguments)
    if file is None:
        if early:
            raise ValueError(f'{early[0]} changes a config: give --config FILE before it')
        return arguments
    if early:
        raise ValueError(f'{early[0]} stands before --config: give --config={file} first')
    config = _load(file)
    _check_keys(file, config)
    for name, text in overrides:
        _check_type(name, _find(config, name), text)
    return arguments


def nearest(name: str, known: Sequence[str], before: str = '') -> str:
    """Returns 'did you mean ...? ' with the most similar known name, or '' if none is similar."""
    similar = nearest_name(name, known, _SIMILARITY)
    return f'did you mean {before}{similar}? ' if similar else ''


def recipes() -> list[str]:
    """Returns the names of the recipes that `--config` accepts."""
    return sorted(file.stem for file in FOLDER.glob('[!_]*.py'))


def help_keys() -> Iterator[str]:
    """Yields the help of each config key: its flag with the default, the allowed values and a description."""
    for name, key in KEYS.items():
        allowed = ', '.join(choice or "''" for choice in key.choices) or key.limits
        allowed = f'{key.special} or {allowed}' if key.special is not None else allowed
        yield f'--config.{name}={key.default!r}{f"  in {allowed}" if allowed else ""}\n    {key.help}'


def _split(arguments):
    """Splits a command line into config file, overrides and other arguments.

    Returns:
      The command line with the name of the recipe replaced by its file; the file, or None; the overrides before
      `--config`; and the overrides after `--config`, each as (key, text or None).

    Raises:
      ValueError: there are two config files.
    """
    arguments, file, early, overrides = list(arguments), None, [], []
    for index, word in enumerate(arguments[1:], 1):
        if word == '--':
            break
        if match := re.fullmatch(r'--?config(?:=(.*))?', word, re.DOTALL):
            separate = '=' not in word
            value = ' '.join(arguments[index + 1:index + 2]) if separate else match[1]
            if file is not None:
                raise ValueError(f'--config is given twice, as {file} and as {value}: give one of them')
            file = _file(value)
            if file != value:
                arguments[index + separate] = file if separate else f'--config={file}'
        elif match := re.fullmatch(r'--?(?:no)?config\.([^=]+)(?:=(.*))?', word, re.DOTALL):
            overrides.append(match.groups())
            early += [word] if file is None else []
    return arguments, file, early, overrides


def _file(value: str) -> str:
    """Returns the path of a recipe given by name, or the value unchanged."""
    return str(FOLDER / f'{value}.py') if value in recipes() and not os.path.isfile(value) else value


def _check_file(file: str) -> None:
    path = file.split(':', 1)[0]
    if os.path.isfile(path):
        return
    siblings = glob.glob(os.path.join(glob.escape(os.path.dirname(path)), '*.py')) if os.path.dirname(path) else []
    known = {os.path.basename(name).removesuffix('.py'): name for name in sorted(siblings)}
    known = known | {name: name for name in recipes()}
    similar = nearest_name(os.path.basename(path).removesuffix('.py'), known, _SIMILARITY)
    hint = f'did you mean {shlex.quote(known[similar])}? ' if similar else ''
    kind = 'a folder' if os.path.isdir(path) else 'no file and no recipe'
    raise FileNotFoundError(f'--config={file} is {kind}: {hint}the recipes are {", ".join(recipes())}')


def _load(file: str) -> Any:
    """Loads the config from a file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is JSON, or its code fails.
    """
    _check_file(file)
    if file.endswith('.json'):
        raise ValueError(f'--config={file} is JSON, and a config is a Python file with get_config(), such as those in '
                         'configs/*.py: give the one that the run was started with. --mode=evaluate needs none')
    try:
        config = ConfigFileFlagParser('config').parse(file)
        getattr(config, 'keys', None)  # ml_collections delays an error until the first use: raise it here
        return config
    except Exception as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        raise ValueError(f'--config={file} fails: {type(error).__name__}: {lines[-1].strip()}') from error


def _check_keys(file: str, config: Any) -> None:
    """Checks that a config has all keys. For a comparison, checks the config of its runs.

    Raises:
      ValueError: keys are missing, or the config is not a ConfigDict.
    """
    advice = 'start from base.get_config(), as in: from evit_jax.configs import base'
    if not isinstance(config, ConfigDict):
        raise ValueError(f'--config={file}: get_config() returns {type(config).__name__} and not ConfigDict: {advice}')
    checked, path = (config.run, 'config.run') if isinstance(config.get('run'), ConfigDict) else (config, 'config')
    present = _keys(checked)
    groups = {name.rpartition('.')[0] for name in present}
    missing = []
    for name in KEYS:
        group = name.rpartition('.')[0]
        if name not in present:
            missing.append(f'{path}.{name if not group or group in groups else group}')
    if missing:
        raise ValueError(f'--config={file} lacks {", ".join(dict.fromkeys(missing))}: {advice}, and override '
                         'keys')


def _find(config: Any, name: str) -> Any:
    """Returns the value of a dotted key.

    Raises:
      ValueError: there is no such key. The message gives the nearest key and all keys of the group.
    """
    group, path = config, 'config'
    for key in name.split('.'):
        if '[' in key:
            return None  # an element of a tuple: ml_collections checks it
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
    """Returns a hint: the nearest key of the group, and keys of the same name in other groups."""
    similar = nearest_name(key, group, _SIMILARITY)
    near = [f'{path}.{similar}'] if similar else []
    same = [f'config.{name}' for name in _keys(config) if name.split('.')[-1] == key]
    return f'did you mean {" or ".join(near + same)}? ' if near + same else ''


def _keys(group: ConfigDict, before: str = '') -> list[str]:
    """Returns the dotted keys of a config."""
    return [name for key, value in group.items() for name in (
        _keys(value, f'{before}{key}.') if isinstance(value, ConfigDict) else [before + key])]


def _check_type(name: str, default: Any, text: str | None) -> None:
    """Raises a ValueError if the text is not a value of the default's type."""
    if text is None:
        return
    expected, parser = _TYPES.get(type(default), ('', None))
    try:
        if parser and math.isnan(parser.parse(text)):
            raise ValueError(text)
        if isinstance(default, tuple) and any(isinstance(value, str) for value in default):
            expected = """a list of names, as "('EViT','ToMe')\""""
            names = ast.literal_eval(text)
            if not isinstance(names, tuple | list) or not all(isinstance(value, str) for value in names):
                raise ValueError(text)
        elif isinstance(default, tuple) and (default or name.removeprefix('run.') in KEYS):
            expected = 'a list of numbers, as 0.9,0.7'
            [float(part) for part in re.split(r'[,\s]+', text.strip().strip('()[]')) if part]
    except (ValueError, TypeError, SyntaxError):
        meaning = f' ({KEYS[name].help})' if name in KEYS else ''
        raise ValueError(f'--config.{name}={text} is not {expected}; the config has {default}{meaning}') from None
