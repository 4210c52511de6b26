"""A pickle reader for untrusted files. It interprets the opcodes of plain containers and never imports a global.

A subclass of `pickle.Unpickler` with an allow-list in `find_class` is shorter, but does not protect the process:
- A 9-byte pickle that stores at memo index 2**28 makes it allocate 4 GB.
- A dict key of a million nested tuples overflows the C stack in `hash` (segmentation fault).
- BUILD writes into the `__dict__` of every object that `find_class` returned, so that a file can alter it.
Here the memo is a dict, only scalar keys are accepted, and a global is represented by its name.
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
_KEY_TYPES = str | int | float | bytes | None  # no tuples: hashing a deeply nested one overflows the C stack


class GlobalName(str):
    """The name of a global in a pickle, such as `torch._utils._rebuild_tensor_v2`. It is never imported."""

    __slots__ = ()


@dataclasses.dataclass(eq=False)
class InertObject:
    """Represents an object that is not constructed: the name of its class, the constructor arguments and the state."""

    name: str
    arguments: tuple
    state: Any = None


@dataclasses.dataclass(frozen=True)
class AllowList:
    """The globals that a pickle may refer to.

    Attributes:
      calls: name of a global -> function to call instead, with the tuple of arguments.
      types: names of globals that may be passed as arguments, but not called.
      inert: names of classes whose objects become `InertObject`s.
      persistent_load: function that converts a persistent id to an object.
    """

    calls: Mapping[str, Callable[[tuple], Any]]
    types: Set[str]
    inert: Set[str]
    persistent_load: Callable[[Any], Any]


def load(data: bytes, allowed: AllowList) -> Any:
    """Reads the object in a pickle.

    Returns:
      Dicts, lists, tuples, sets, numbers and text, and objects that the functions of `allowed` create.

    Raises:
      ValueError: the pickle is damaged, or uses a global or an opcode that is not allowed.
    """
    machine = _StackMachine(allowed)
    try:
        for opcode, argument, position in pickletools.genops(data):  # raises a ValueError if the pickle is truncated
            if opcode.name == 'STOP':
                if position + 1 != len(data):
                    raise ValueError(f'{len(data) - position - 1} bytes follow its end')
                return machine.result()
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'malformed: {type(error).__name__} in {opcode.name}') from error


def printable(value: Any) -> str:
    """Formats text from a file for a message: at most 81 characters, with control characters escaped.

    Any other value is represented by the name of its type.
    """
    text = ascii(value)[1:-1] if isinstance(value, str) else type(value).__name__
    return text if len(text) <= 80 else f'{text[:80]}…'


class _StackMachine:
    """Executes pickle opcodes on a stack. `_marked_stacks` holds the stack below each MARK."""

    def __init__(self, allowed: AllowList):
        self._allowed = allowed
        self._stack: list[Any] = []
        self._marked_stacks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def result(self):
        if self._marked_stacks or len(self._stack) != 1:
            raise ValueError('malformed: its stack does not hold one object at the end')
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
        elif name in self._with_argument:
            self._with_argument[name](self, argument)
        elif name in self._without_argument:
            self._without_argument[name](self)
        elif name not in ('PROTO', 'FRAME'):
            raise ValueError(f'it uses the opcode {name}, which weights do not need')

    def _push_tuple(self, length):
        if len(self._stack) < length:
            raise IndexError
        self._stack[-length:] = [tuple(self._stack[-length:])]

    def _mark(self):
        self._marked_stacks.append(self._stack)
        self._stack = []

    def _pop_to_mark(self):
        items, self._stack = self._stack, self._marked_stacks.pop()
        return items

    def _pop(self):
        self._stack.pop()

    def _tuple(self):
        items = self._pop_to_mark()
        self._stack.append(tuple(items))

    def _list(self):
        items = self._pop_to_mark()
        self._stack.append(items)

    def _dict(self):
        items = self._pop_to_mark()
        self._stack.append({})
        self._set_items(items)

    def _append(self):
        self._extend([self._stack.pop()])

    def _appends(self):
        self._extend(self._pop_to_mark())

    def _extend(self, items):
        if type(self._stack[-1]) is not list:
            raise ValueError(f'it appends to a {printable(self._stack[-1])}')
        self._stack[-1].extend(items)

    def _setitem(self):
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _setitems(self):
        self._set_items(self._pop_to_mark())

    def _set_items(self, items):
        if type(self._stack[-1]) is not dict or len(items) % 2:
            raise ValueError(f'it sets items of a {printable(self._stack[-1])}')
        for key, value in zip(items[::2], items[1::2]):
            self._stack[-1][checked_key(key)] = value

    def _additems(self):
        items = self._pop_to_mark()
        if type(self._stack[-1]) is not set:
            raise ValueError(f'it adds to a {printable(self._stack[-1])}')
        self._stack[-1].update(map(checked_key, items))

    def _put(self, index):
        self._memo[index] = self._stack[-1]

    def _memoize(self):
        self._put(len(self._memo))

    def _get(self, index):
        if index not in self._memo:
            raise ValueError(f'it reads entry {index:#x} of its memo, which does not exist')
        self._stack.append(self._memo[index])

    def _global(self, words):
        self._push_name('.'.join(words.split(' ', 1)))

    def _stack_global(self):
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError(f'the name of a global is not text: {printable(module)}, {printable(name)}')
        self._push_name(f'{module}.{name}')

    def _push_name(self, name):
        if name not in self._allowed.calls and name not in self._allowed.types and name not in self._allowed.inert:
            raise ValueError(f'it refers to {printable(name)}')
        self._stack.append(GlobalName(name))

    def _reduce(self):
        arguments, called = self._stack.pop(), self._stack.pop()
        if type(called) is not GlobalName or type(arguments) is not tuple:
            raise ValueError(f'it calls a {printable(called)}' if type(called) is not GlobalName
                             else f'it calls {called} with a {printable(arguments)}')
        if called in self._allowed.inert:
            self._stack.append(InertObject(called, arguments))
        elif called in self._allowed.calls:
            self._stack.append(self._allowed.calls[called](arguments))
        else:
            raise ValueError(f'it calls {called}, which is allowed only as a type')

    def _newobj(self):
        arguments, name = self._stack.pop(), self._stack.pop()
        if type(name) is not GlobalName or name not in self._allowed.inert or type(arguments) is not tuple:
            raise ValueError(f'it makes an object of {printable(name)}')
        self._stack.append(InertObject(name, arguments))

    def _build(self):
        """Sets the state of an inert object. The attributes of an ordered dict, such as a state_dict, are dropped."""
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) is InertObject:
            target.state = state
        elif type(target) is not dict or type(state) is not dict:
            raise ValueError(f'it sets the state of a {printable(target)}')

    def _binpersid(self):
        self._stack.append(self._allowed.persistent_load(self._stack.pop()))

    _with_argument = {'PUT': _put, 'BINPUT': _put, 'LONG_BINPUT': _put, 'GET': _get, 'BINGET': _get,
                      'LONG_BINGET': _get, 'GLOBAL': _global}
    _without_argument = {
        'MARK': _mark, 'POP': _pop, 'TUPLE': _tuple, 'LIST': _list, 'DICT': _dict, 'APPEND': _append,
        'APPENDS': _appends, 'SETITEM': _setitem, 'SETITEMS': _setitems, 'ADDITEMS': _additems, 'MEMOIZE': _memoize,
        'STACK_GLOBAL': _stack_global, 'REDUCE': _reduce, 'NEWOBJ': _newobj, 'BUILD': _build,
        'BINPERSID': _binpersid}


def checked_key(key: Any) -> Any:
    """Returns the key of a dict or the item of a set, after checking its type.

    Raises:
      ValueError: the key is not a number, text, bytes or None.
    """
    if not isinstance(key, _KEY_TYPES) or isinstance(key, GlobalName):
        raise ValueError(f'a key is a {printable(key)}')
    return key
