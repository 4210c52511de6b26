"""Runs a program of the package: `evit PROGRAM ...`, or `python -m evit_jax PROGRAM ...`.

`evit train`, `evit evaluate` and `evit knn` run the modes of `python -m evit_jax.main`. Any other `evit NAME` runs
`python -m evit_jax.NAME`.
"""

import ast
import pathlib
import runpy
import signal
import sys

from evit_jax import cli, config_errors

_FOLDER = pathlib.Path(__file__).parent
_MAIN = {'train': 'Trains a model: evit train --config digits --workdir runs/digits',
         'evaluate': 'Evaluates a trained model: evit evaluate --workdir runs/digits',
         'knn': 'Evaluates features by k-NN: evit knn --workdir runs/knn --config.init_from=weights/dinov2_s'}


def programs(start: str = 'evit') -> dict[str, str]:
    """Returns the first docstring line of each program, by name. Commands in these lines begin with `start`."""
    lines = {name: line.replace('evit ', f'{start} ') for name, line in _MAIN.items()}
    for path in sorted(_FOLDER.glob('[!_]*.py')):
        source = path.read_text(encoding='utf-8')
        if path.stem != 'main' and 'cli.run(' in source and "__name__ == '__main__'" in source:
            docstring = ast.get_docstring(ast.parse(source)) or ''
            first = ' '.join(docstring.partition('\n')[0].split())
            lines[path.stem] = first.replace('python -m evit_jax.', f'{start} ')
    return lines


def main(words: list[str], start: str = 'evit') -> int:
    """Runs the program named by the first word, or lists the programs.

    Args:
      words: the command line without the command itself.
      start: the command, as shown in the output of the program.

    Returns:
      The exit code: 2 if there is no such program.
    """
    if words and words[0] in programs():
        name, *rest = words
        cli.command = f'{start} {name}'
        sys.argv = [sys.argv[0], *([f'--mode={name}'] if name in _MAIN else []), *rest]
        runpy.run_module(f'evit_jax.{"main" if name in _MAIN else name}', run_name='__main__', alter_sys=True)
        return 0
    lines = [f'Programs, started as {start} NAME, each with --help:',
             *(f'  {name:<14}{line}' for name, line in programs(start).items())]
    other = [word for word in words if word not in ('-h', '--help', '-help')]
    if other:
        hint = config_errors.nearest(other[0], [*programs()])
        lines.append(f'error: unknown program {other[0]!r}: {hint}there are {", ".join(programs())}')
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` must not print a traceback
    print('\n'.join(lines), file=sys.stderr if other else sys.stdout)
    return 2 if other else 0


def console_script() -> None:
    """Entry point of the command `evit`."""
    sys.exit(main(sys.argv[1:]))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:], 'python -m evit_jax'))
