"""What the programs have in common: their flags, the log lines they show, and errors in one line."""

import io
import os
import select
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from absl import flags, logging

from evit_jax import config_errors

_MENDABLE = (flags.Error, ValueError, KeyError, AttributeError, TypeError, OSError, FloatingPointError)


def run(program: Callable[..., None] | Mapping[str, Callable[..., None]], *operands: str) -> None:
    """Parses the flags and runs the program; errors that a user can mend end it with one line and exit code 2.

    Args:
      program: or several by name, of which the command line says one before the flags; its operands may stand behind
        the name, as in 'drop CHECKPOINT'.
      operands: names of the words that the command line gives to the program beside the flags; where the last one
        ends in '...', it stands for one or more, and in brackets, '[IMAGES...]', for none too.
    """
    if {'-h', '-help', '--help'} & {*sys.argv}:
        print(sys.modules['__main__'].__doc__, flags.FLAGS.main_module_help(), sep='\n')
        return
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show must not end the program
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        words = _parsed(sys.argv)[1:]
        if isinstance(program, Mapping):
            names = {name.split()[0]: name for name in program}
            if not words or words[0] not in names or (len(words) > 1 and names[words[0]] == words[0]):
                raise ValueError(f'say {" or ".join(names)} before the flags, not {" ".join(words) or "nothing"}')
            usage = names[words.pop(0)]
            program, operands = program[usage], tuple(usage.split()[1:])
        if len(words) > len(operands) and not ''.join(operands).rstrip(']').endswith('...'):
            raise ValueError(f'what is {words[len(operands)]!r} for? Every flag has the form --name=value')
        if len(words) < sum(not name.startswith('[') for name in operands):
            raise ValueError(f'give {" and ".join(operands)}, not {" ".join(words) or "nothing"}')
        _log_our_own_lines()
        program(*words)
    except _MENDABLE as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(141)
        if os.environ.get('EVIT_JAX_TRACEBACK'):
            raise
        while isinstance(error, KeyError | AttributeError) and error.args and isinstance(error.args[0], Exception):
            error = error.args[0]  # ml_collections wraps what it has to say about a nested key
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f'error: {" ".join(str(text).split())}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('stopped', file=sys.stderr)
        sys.exit(130)


def _parsed(arguments: list[str]) -> list[str]:
    """Sets the flags; returns the other words of the command line.

    Raises:
      ValueError, FileNotFoundError: there is no such config, key of it, or flag; names the nearest.
    """
    config_errors.check(arguments, flags.FLAGS)
    try:
        return flags.FLAGS(arguments)
    except flags.UnrecognizedFlagError as error:
        own = sorted(flag.name for flag in flags.FLAGS.get_key_flags_for_module(arguments[0]))
        hint = config_errors.nearest(error.flagname.split('.')[0], own, '--')
        raise ValueError(f'unknown flag --{error.flagname}: {hint}this program has '
                         f'{", ".join(f"--{name}" for name in own)}') from None


def numbers(flag: str, texts: Sequence[str] | None, kind: type) -> tuple:
    """The values of a flag that is a list of numbers.

    Raises:
      ValueError: it is none.
    """
    try:
        return tuple(map(kind, texts or ()))
    except ValueError:
        whole = 'whole ' if kind is int else ''
        raise ValueError(f'--{flag}={",".join(texts)} is no list of {whole}numbers: give them with commas '
                         'between') from None


def names_on_stdin() -> Iterator[str]:
    """The lines of standard input as names of files, whatever bytes they hold."""
    lines = getattr(sys.stdin, 'buffer', sys.stdin)  # the text layer would refuse names that are not UTF-8
    for number, line in enumerate(lines):
        name = os.fsdecode(line)
        yield name.removeprefix('\ufeff') if number == 0 else name


def _nobody_reads() -> bool:
    """Whether who read what is printed has gone, as `head` does; nothing more is printed then."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _log_our_own_lines() -> None:
    """Ours from INFO on, of the libraries what is a warning: a save alone has 40 lines to say."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    package = os.path.dirname(os.path.abspath(__file__))
    logging.get_absl_handler().addFilter(lambda record: record.name != 'asyncio' and (
        record.levelno >= logging.converter.STANDARD_WARNING or record.pathname.startswith(package)))
    # What a failed save leaves behind says so in asyncio's log, and, a hundred times, here.
    shown = sys.unraisablehook
    sys.unraisablehook = lambda seen: None if str(seen.exc_value) == 'Event loop is closed' else shown(seen)
