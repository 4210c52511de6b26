"""Shared by the programs: flags and operands of the command line, log lines, and errors in one line."""

import io
import os
import select
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from absl import flags, logging

from evit_jax import config_errors

command = ''  # how the program was started, as 'evit predict'; '': as python -m evit_jax.predict
_USER_ERRORS = (flags.Error, ValueError, KeyError, AttributeError, TypeError, OSError, FloatingPointError)


def run(program: Callable[..., None] | Mapping[str, Callable[..., None]], *operands: str) -> None:
    """Parses the flags and runs the program. Errors that a user can correct print one line and end with exit code 2.

    Args:
      program: function that runs the program with its operands as arguments. Or several functions by the name of their
        subcommand and its operands, as in 'drop CHECKPOINT'; the command line then starts with a subcommand.
      operands: names of the words that the program takes beside the flags. A last name that ends in '...' stands for
        one or more words; a name in brackets, as '[IMAGES...]', is optional.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show must not end the program
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        if {'-h', '-help', '--help'} & {*sys.argv}:
            print(_usage(sys.modules['__main__'].__doc__), flags.FLAGS.main_module_help(), sep='\n', flush=True)
            return
        if '--helpkeys' in sys.argv and 'config' in flags.FLAGS:
            print(*config_errors.help_keys(), sep='\n', flush=True)
            return
        words = _parse(sys.argv)[1:]
        if isinstance(program, Mapping):
            names = {name.split()[0]: name for name in program}
            if not words or words[0] not in names or (len(words) > 1 and names[words[0]] == words[0]):
                raise ValueError(f'give {" or ".join(names)} before the flags, not {" ".join(words) or "nothing"}')
            usage = names[words.pop(0)]
            program, operands = program[usage], tuple(usage.split()[1:])
        if len(words) > len(operands) and not ''.join(operands).rstrip(']').endswith('...'):
            raise ValueError(f'unexpected argument {words[len(operands)]!r}: every flag has the form --name=value')
        if len(words) < sum(not name.startswith('[') for name in operands):
            raise ValueError(f'give {" and ".join(operands)}, not {" ".join(words) or "nothing"}')
        configure_logging()
        program(*words)
    except _USER_ERRORS as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            sys.exit(141)
        if os.environ.get('EVIT_JAX_TRACEBACK'):
            raise
        while isinstance(error, KeyError | AttributeError) and error.args and isinstance(error.args[0], Exception):
            error = error.args[0]  # ml_collections wraps its errors about nested keys
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f'error: {" ".join(str(text).split())}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('stopped', file=sys.stderr)
        sys.exit(130)


def numbers(flag: str, texts: Sequence[str] | None, kind: type) -> tuple:
    """Returns the values of a flag that is a list of numbers.

    Raises:
      ValueError: a value is no number of this kind.
    """
    try:
        return tuple(map(kind, texts or ()))
    except ValueError:
        whole = 'whole ' if kind is int else ''
        raise ValueError(f'--{flag}={",".join(texts)} is no list of {whole}numbers: give them with commas '
                         'between') from None


def names_on_stdin() -> Iterator[str]:
    """Yields the lines of standard input as file names, including names that are not UTF-8."""
    lines = getattr(sys.stdin, 'buffer', sys.stdin)  # the text layer would refuse names that are not UTF-8
    for index, line in enumerate(lines):
        name = os.fsdecode(line)
        yield name.removeprefix('\ufeff') if index == 0 else name


def _parse(arguments: list[str]) -> list[str]:
    """Sets the flags; returns the other words of the command line.

    Raises:
      ValueError, FileNotFoundError: there is no such config, config key or flag; the message names the nearest.
    """
    arguments = config_errors.resolve(arguments, flags.FLAGS)
    try:
        return flags.FLAGS(arguments)
    except flags.UnrecognizedFlagError as error:
        names = sorted(flag.name for flag in flags.FLAGS.get_key_flags_for_module(arguments[0]))
        hint = config_errors.nearest(error.flagname.split('.')[0], names, '--')
        raise ValueError(f'unknown flag --{error.flagname}: {hint}this program has '
                         f'{", ".join(f"--{name}" for name in names)}') from None


def _usage(text: str) -> str:
    """Returns a program's help with the commands written as the user started this one."""
    start, _, name = command.rpartition(' ')
    if name in ('train', 'evaluate'):
        text = text.replace('python -m evit_jax.main --mode=evaluate', f'{start} evaluate')
        return text.replace('python -m evit_jax.main', f'{start} train')
    return text.replace('python -m evit_jax.', f'{start} ') if start else text


def _output_is_closed() -> bool:
    """Returns whether the reader of standard output has closed it, as `head` does; discards later output if so."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def configure_logging() -> None:
    """Shows log lines of this package from INFO on, and of libraries from WARNING on: a save alone logs 40 lines."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    package = os.path.dirname(os.path.abspath(__file__))
    logging.get_absl_handler().addFilter(lambda record: record.name != 'asyncio' and (
        record.levelno >= logging.converter.STANDARD_WARNING or record.pathname.startswith(package)))
    # A failed save leaves event loops behind that report themselves here, a hundred times, and in asyncio's log.
    default_hook = sys.unraisablehook
    sys.unraisablehook = lambda error: (
        None if str(error.exc_value) == 'Event loop is closed' else default_hook(error))
