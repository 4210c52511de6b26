"""Reads the text of a program compiled for TPU: what its chips exchange, and the cycles that the compiler estimates."""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r'(ENTRY )?%([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$')
_ARRAY = re.compile(r'\b([a-z]+\d*)\w*\[([\d,]*)\]')
_CALLED = re.compile(r'\b(?:calls|to_apply|body|condition|branch_computations|\w+_computation)='
                     r'\{?(%[\w.\-]+(?:, %[\w.\-]+)*)')
_COLLECTIVE = re.compile(r'(all-reduce|all-gather|reduce-scatter|(?:ragged-)?all-to-all|collective-\w+)(-start)?$')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r'\bchannel_id=(\d+)')
_UNESTIMATED = ('sort', 'custom-call', 'gather', 'scatter', 'copy-start', 'slice-start', 'fusion')
_LARGE = 1024  # elements; less takes no time that counts


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str      # as written: one array, or several in parentheses
    operation: str
    rest: str       # operands and attributes
    root: bool


class Collective(NamedTuple):
    """An exchange among the chips."""

    kind: str       # 'all-reduce', ...; whether asynchronous or not
    count: float    # how often a run of the program does it; nan in a loop whose turns are not known
    bytes: float    # of the whole arrays exchanged, each time: all that is summed, or all that is collected


class Cycles(NamedTuple):
    """What the compiler estimates."""

    total: float
    unestimated: dict[str, int]  # operations on large arrays that are not in it, and how many there are


class Program:
    """A program's computations."""

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._entry = ''
        lines: dict[str, Instruction] = {}
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                lines = self._computations[head[2]] = {}
                self._entry = head[2] if head[1] else self._entry
            elif found := _INSTRUCTION.match(line):
                root, name, *parts = found.groups()
                lines[name] = Instruction(name, *parts, root=root is not None)
        if not self._entry:
            raise ValueError('this is no text of a compiled program: it has no ENTRY computation')

    def collectives(self) -> list[Collective]:
        """Every exchange once, though the compiler spreads an asynchronous one over several fusions."""
        found = {}
        for place, instruction, times, _ in self._walk(self._entry):
            if kind := _COLLECTIVE.match(instruction.operation):
                channel = _CHANNEL.search(instruction.rest)
                key = kind[1], channel[1] if channel else (place, instruction.name)
                found.setdefault(key, self._collective(place, instruction, kind[1], times))
        return list(found.values())

    def cycles(self) -> Cycles:
        """The sum over what is run, loops with their turns."""
        total, unestimated = 0.0, collections.Counter()
        for _, instruction, times, counted in self._walk(self._entry):
            if counted:
                continue
            if estimate := _CYCLES.search(instruction.rest):
                total += times * int(estimate[1])
            elif instruction.operation in _UNESTIMATED and _elements(instruction.shape) > _LARGE:
                unestimated[_label(instruction)] += 1
        return Cycles(total, dict(unestimated))

    def _walk(self, place: str, times: float = 1,
              counted: bool = False) -> Iterator[tuple[str, Instruction, float, bool]]:
        """Instructions in called computations too: where, how often run, whether in something that has an estimate."""
        for instruction in self._computations[place].values():
            yield place, instruction, times, counted
            turns = times * (self._turns(place, instruction) if instruction.operation == 'while' else 1)
            inside = counted or instruction.operation == 'fusion'
            for names in _CALLED.findall(instruction.rest):
                for name in names.replace('%', '').split(', '):
                    yield from self._walk(name, turns, inside)

    def _collective(self, place, instruction, kind, times):
        shapes = _arrays(instruction.shape)
        if instruction.operation.endswith('-start') and kind != 'all-reduce':
            shapes = [shape for shape in shapes if shape != ('u32', 1)]  # what the compiler notes down
            shapes = shapes[len(shapes) // 2:]  # operands, then results
        if kind == 'reduce-scatter':
            shapes = [shape for name in _operands(instruction)
                      for shape in _arrays(self._computations[place][name].shape)]
        if place.startswith('all-reduce-scatter'):
            kind = 'reduce-scatter'  # summed, and of the sum each chip keeps its part
        return Collective(kind, times, sum(_width(dtype) * size for dtype, size in shapes))

    def _turns(self, place: str, loop: Instruction) -> float:
        """Of a loop that counts in constant steps up to a limit; nan of any other."""
        called = dict(re.findall(r'\b(condition|body)=%([\w.\-]+)', loop.rest))
        condition, body = (self._computations[called[part]] for part in ('condition', 'body'))
        try:
            test = next(line for line in condition.values() if line.root)
            counter, limit = (condition[name] for name in _operands(test))
            number = int(re.search(r'index=(\d+)', counter.rest)[1])
            root = next(line for line in body.values() if line.root)
            step = next(body[name] for name in _operands(body[_operands(root)[number]])
                        if body[name].operation == 'constant')
            initial = self._computations[place][_operands(loop)[0]]
            start = self._computations[place][_operands(initial)[number]]
            while start.operation == 'copy':
                start = self._computations[place][_operands(start)[0]]
            return math.ceil((_constant(limit) - _constant(start)) / _constant(step))
        except (StopIteration, LookupError, TypeError, ValueError):
            return math.nan


def _label(instruction: Instruction) -> str:
    """What it does: of a fusion only its name tells, of a custom call its target."""
    if target := _TARGET.search(instruction.rest):
        return target[1]
    return re.sub(r'[.\d]+$', '', instruction.name) if instruction.operation == 'fusion' else instruction.operation


def _operands(instruction: Instruction) -> list[str]:
    return re.findall(r'%([\w.\-]+)', re.split(r'\)(?:,|$)', instruction.rest)[0])


def _constant(instruction: Instruction) -> int:
    if instruction.operation != 'constant':
        raise ValueError(f'{instruction.name} is no constant')
    return int(re.match(r'-?\d+', instruction.rest)[0])


def _arrays(shape: str) -> list[tuple[str, int]]:
    """Element type and size of each array."""
    return [(dtype, math.prod(int(size) for size in sizes.split(',') if size))
            for dtype, sizes in _ARRAY.findall(shape)]


def _elements(shape: str) -> int:
    return sum(size for _, size in _arrays(shape))


def _width(dtype: str) -> float:
    """Bytes of an element."""
    return 1 if dtype == 'pred' else int(re.search(r'\d+', dtype)[0]) / 8
