"""Pickles read as data: a machine for the opcodes that plain containers need, which runs nothing that a file names.

Python's own unpickler calls what it finds; even one that looks names up in a list can be made to fill the memory, or to
crash in the hash of a deep tuple. Here a name stays text, and what is done with it stands in the caller's tables.
"""

import dataclasses
import pickletools
from collections.abc import Callable, Mapping, Set
from typing import Any

_VALUES = {'INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4', 'FLOAT', 'BINFLOAT', 'UNICODE',
           'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8', 'STRING', 'BINSTRING', 'SHORT_BINSTRING', 'BINBYTES',
           'SHORT_BINBYTES', 'BINBYTES8'}
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_EMPTY = {'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple, 'EMPTY_SET': set}
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
_KEYS = str | int | float | bytes | None  # no tuples: the hash of a deep one overflows the stack


class Name(str):
    """What a pickle names, as `torch._utils._rebuild_tensor_v2`; text, and no more."""

    __slots__ = ()


@dataclasses.dataclass(eq=False)
class Inert:
    """An object of a class that is allowed to be there: what it was made of, and never the object."""

    name: str
    arguments: tuple
    state: Any = None


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What the names in a pickle may mean.

    Fields:
      calls: name -> function of the tuple of arguments that stands in for calling it.
      types: names that are only handed on.
      inert: names of classes whose objects become `Inert`.
      persistent: what a persistent id means.
    """

    calls: Mapping[str, Callable[[tuple], Any]]
    types: Set[str]
    inert: Set[str]
    persistent: Callable[[Any], Any]


def load(data: bytes, allowed: Allowed) -> Any:
    """The object in a pickle: dicts, lists, tuples, sets, numbers, text, and what `allowed` makes of names.

    Raises:
      ValueError: anything else is in it, or it is damaged; names what.
    """
    machine = _Machine(allowed)
    try:
        for opcode, argument, at in pickletools.genops(data):  # raises a ValueError where it breaks off
            if opcode.name == 'STOP':
                if at + 1 != len(data):
                    raise ValueError(f'{len(data) - at - 1} bytes follow its end')
                return machine.result()
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'damaged, or made up: {type(error).__name__} in {opcode.name}') from error


def shown(text: Any) -> str:
    """Text of a file for a message: short, and without what a terminal would obey."""
    said = ascii(text)[1:-1] if isinstance(text, str) else type(text).__name__
    return said if len(said) <= 80 else f'{said[:80]}…'


class _Machine:
    """A stack, the stacks below its marks, and a memo."""

    def __init__(self, allowed: Allowed):
        self._allowed = allowed
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def result(self):
        if self._below or len(self._stack) != 1:
            raise ValueError('damaged, or made up: its stack does not come out even')
        return self._stack.pop()

    def step(self, name: str, argument: Any) -> None:
        """Executes one opcode."""
        if name in _VALUES:
            self._stack.append(argument)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self._stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            self._push_tuple(_TUPLES[name])
        elif name in self._takes_argument:
            self._takes_argument[name](self, argument)
        elif name in self._steps:
            self._steps[name](self)
        elif name not in ('PROTO', 'FRAME'):
            raise ValueError(f'it uses the opcode {name}, which weights have no need of')

    def _push_tuple(self, length):
        if len(self._stack) < length:
            raise IndexError
        self._stack[-length:] = [tuple(self._stack[-length:])]

    def _mark(self):
        self._below.append(self._stack)
        self._stack = []

    def _marked(self):
        items, self._stack = self._stack, self._below.pop()
        return items

    def _pop(self):
        self._stack.pop()

    def _tuple(self):
        items = self._marked()
        self._stack.append(tuple(items))

    def _list(self):
        items = self._marked()
        self._stack.append(items)

    def _dict(self):
        items = self._marked()
        self._stack.append({})
        self._set(items)

    def _append(self):
        self._extend([self._stack.pop()])

    def _appends(self):
        self._extend(self._marked())

    def _extend(self, items):
        if type(self._stack[-1]) is not list:
            raise ValueError(f'it appends to a {shown(self._stack[-1])}')
        self._stack[-1].extend(items)

    def _setitem(self):
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _setitems(self):
        self._set(self._marked())

    def _set(self, items):
        if type(self._stack[-1]) is not dict or len(items) % 2:
            raise ValueError(f'it sets items of a {shown(self._stack[-1])}')
        for key, value in zip(items[::2], items[1::2]):
            self._stack[-1][checked_key(key)] = value

    def _additems(self):
        items = self._marked()
        if type(self._stack[-1]) is not set:
            raise ValueError(f'it adds to a {shown(self._stack[-1])}')
        self._stack[-1].update(map(checked_key, items))

    def _put(self, index):
        self._memo[index] = self._stack[-1]

    def _memoize(self):
        self._put(len(self._memo))

    def _get(self, index):
        if index not in self._memo:
            raise ValueError(f'it recalls entry {index:#x} of its memo, which is not there')
        self._stack.append(self._memo[index])

    def _global(self, words):
        self._push_name('.'.join(words.split(' ', 1)))

    def _stack_global(self):
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError(f'it names something by a {shown(name)} in a {shown(module)}')
        self._push_name(f'{module}.{name}')

    def _push_name(self, name):
        if name not in self._allowed.calls and name not in self._allowed.types and name not in self._allowed.inert:
            raise ValueError(f'it asks for {shown(name)}')
        self._stack.append(Name(name))

    def _reduce(self):
        arguments, called = self._stack.pop(), self._stack.pop()
        if type(called) is not Name or type(arguments) is not tuple:
            raise ValueError(f'it calls a {shown(called)}' if type(called) is not Name
                             else f'it calls {called} with a {shown(arguments)}')
        if called in self._allowed.inert:
            self._stack.append(Inert(called, arguments))
        elif called in self._allowed.calls:
            self._stack.append(self._allowed.calls[called](arguments))
        else:
            raise ValueError(f'it calls {called}, which is only a type here')

    def _newobj(self):
        arguments, made = self._stack.pop(), self._stack.pop()
        if type(made) is not Name or made not in self._allowed.inert or type(arguments) is not tuple:
            raise ValueError(f'it makes an object of {shown(made)}')
        self._stack.append(Inert(made, arguments))

    def _build(self):
        """An ordered dict's attributes (`_metadata`, of a state_dict) are dropped."""
        state, made = self._stack.pop(), self._stack[-1]
        if type(made) is Inert:
            made.state = state
        elif type(made) is not dict or type(state) is not dict:
            raise ValueError(f'it sets the state of a {shown(made)}')

    def _binpersid(self):
        self._stack.append(self._allowed.persistent(self._stack.pop()))

    _takes_argument = {'PUT': _put, 'BINPUT': _put, 'LONG_BINPUT': _put, 'GET': _get, 'BINGET': _get,
                       'LONG_BINGET': _get, 'GLOBAL': _global}
    _steps = {'MARK': _mark, 'POP': _pop, 'TUPLE': _tuple, 'LIST': _list, 'DICT': _dict, 'APPEND': _append,
              'APPENDS': _appends, 'SETITEM': _setitem, 'SETITEMS': _setitems, 'ADDITEMS': _additems,
              'MEMOIZE': _memoize, 'STACK_GLOBAL': _stack_global, 'REDUCE': _reduce, 'NEWOBJ': _newobj,
              'BUILD': _build, 'BINPERSID': _binpersid}


def checked_key(key: Any) -> Any:
    """The key, if it is a number, text or None.

    Raises:
      ValueError: it is not.
    """
    if not isinstance(key, _KEYS) or isinstance(key, Name):
        raise ValueError(f'a key is a {shown(key)}')
    return key
