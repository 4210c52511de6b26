"""Command-line code shared by the programs: flags, operands, log lines and one-line errors."""

import io
import os
import re
import select
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from absl import flags, logging

from evit_jax import config_errors

command = ''  # command that started the program, such as 'evit predict'; '': python -m evit_jax.predict
_USER_ERRORS = (flags.Error, ValueError, KeyError, AttributeError, TypeError, OSError, FloatingPointError)


def run(program: Callable[..., None] | Mapping[str, Callable[..., None]], *operands: str) -> None:
    """Parses the flags and runs the program. Errors that a user can correct print one line and give exit code 2.

    Args:
      program: function that takes the operands as arguments. Or a dict of such functions for a program with
        subcommands; a key gives the subcommand and its operands, such as 'drop CHECKPOINT'.
      operands: names of the positional arguments. A last name that ends in '...' stands for one or more words. A name
        in brackets, such as '[IMAGES...]', is optional.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # avoids an error for names that the terminal cannot show
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
            error = error.args[0]  # ml_collections wraps errors about nested keys
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f'error: {" ".join(str(text).split())}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('stopped', file=sys.stderr)
        sys.exit(130)


def numbers(flag: str, texts: Sequence[str] | None, kind: type) -> tuple:
    """Converts the values of a list flag to numbers.

    Raises:
      ValueError: a value is not a number of this kind.
    """
    try:
        return tuple(map(kind, texts or ()))
    except ValueError:
        whole = 'whole ' if kind is int else ''
        raise ValueError(f'--{flag}={",".join(texts)} is no list of {whole}numbers: give them with commas '
                         'between') from None


def merge_counts(flag: str, texts: Sequence[str]) -> tuple[int | tuple[int, ...], ...]:
    """Converts the values of a flag for r: a number, or the numbers of all blocks joined by hyphens, as 39-31-24.

    Raises:
      ValueError: a value is neither.
    """
    return tuple(tuple(map(int, text.split('-'))) if re.fullmatch(r'\d+(-\d+)+', text) else
                 numbers(flag, [text], int)[0] for text in texts)


def names_on_stdin() -> Iterator[str]:
    """Yields the lines of standard input as file names, including names that are not UTF-8."""
    lines = getattr(sys.stdin, 'buffer', sys.stdin)  # a text stream rejects names that are not UTF-8
    for index, line in enumerate(lines):
        name = os.fsdecode(line)
        yield name.removeprefix('\ufeff') if index == 0 else name


def _parse(arguments: list[str]) -> list[str]:
    """Sets the flags. Returns the positional arguments.

    Raises:
      ValueError, FileNotFoundError: there is no such config, config key or flag. The message gives the nearest name.
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
    """Returns the help text of a program, with commands in the form in which the user started this program."""
    start, _, name = command.rpartition(' ')
    if name in ('train', 'evaluate', 'knn'):
        for mode in ('evaluate', 'knn'):
            text = text.replace(f'python -m evit_jax.main --mode={mode}', f'{start} {mode}')
        return text.replace('python -m evit_jax.main', f'{start} train')
    return text.replace('python -m evit_jax.', f'{start} ') if start else text


def _output_is_closed() -> bool:
    """Returns True if the reader of standard output (such as `head`) has closed it. Later output is then discarded."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def configure_logging() -> None:
    """Shows INFO log lines of this package, and only warnings of libraries (a single save logs 40 lines)."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    package = os.path.dirname(os.path.abspath(__file__))
    logging.get_absl_handler().addFilter(lambda record: record.name != 'asyncio' and (
        record.levelno >= logging.converter.STANDARD_WARNING or record.pathname.startswith(package)))
    # After a failed save, abandoned event loops would print about a hundred errors here and in the log of asyncio.
    default_hook = sys.unraisablehook
    sys.unraisablehook = lambda error: (
        None if str(error.exc_value) == 'Event loop is closed' else default_hook(error))
