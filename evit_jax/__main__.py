"""Lists the programs: python -m evit_jax"""

import ast
import pathlib
import signal
import sys

_FOLDER = pathlib.Path(__file__).parent


def programs() -> dict[str, str]:
    """The first line of each program's docstring, by the program's name."""
    found = {}
    for path in sorted(_FOLDER.glob('[!_]*.py')):
        source = path.read_text(encoding='utf-8')
        if 'cli.run(' in source and "__name__ == '__main__'" in source:
            found[path.stem] = ' '.join((ast.get_docstring(ast.parse(source)) or '').partition('\n')[0].split())
    return found


def main(words: list[str]) -> int:
    """Prints the list; returns the exit code, 2 where words were given that nothing takes."""
    lines = ['Programs, started as python -m evit_jax.NAME, each with --help:',
             *(f'  {name:<14}{line}' for name, line in programs().items())]
    other = [word for word in words if word not in ('-h', '--help', '-help')]
    if other:
        name = other[0] if other[0] in programs() else 'NAME'
        lines.append(f'error: a program is started with a dot, as python -m evit_jax.{name}')
    print('\n'.join(lines), file=sys.stderr if other else sys.stdout)
    return 2 if other else 0


if __name__ == '__main__':
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    sys.exit(main(sys.argv[1:]))
