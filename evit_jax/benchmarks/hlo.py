"""Parses the HLO text of a program compiled for TPU: collectives, and the compiler's estimate of the cycles."""

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
_LARGE = 1024  # elements; operations on smaller arrays take negligible time


class Instruction(NamedTuple):
    """One instruction, a line of a computation."""

    name: str
    shape: str      # text of the shape: one array, or several arrays in parentheses
    operation: str
    rest: str       # operands and attributes
    root: bool


class Collective(NamedTuple):
    """A collective operation between the chips."""

    kind: str       # such as 'all-reduce'; synchronous and asynchronous operations have the same kind
    count: float    # number of executions in one run of the program; NaN in a loop with an unknown trip count
    bytes: float    # total size of the arrays that one execution sums or gathers


class Cycles(NamedTuple):
    """The compiler's estimate of the cycles of a program."""

    total: float
    unestimated: dict[str, int]  # name -> number of operations on large arrays that have no estimate


class Program:
    """A compiled program, parsed from its HLO text."""

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._entry = ''
        lines: dict[str, Instruction] = {}
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                lines = self._computations[head[2]] = {}
                self._entry = head[2] if head[1] else self._entry
            elif match := _INSTRUCTION.match(line):
                root, name, *parts = match.groups()
                lines[name] = Instruction(name, *parts, root=root is not None)
        if not self._entry:
            raise ValueError('the text is not a compiled program: it has no ENTRY computation')

    def collectives(self) -> list[Collective]:
        """Returns the collectives. One that the compiler spreads over several fusions is returned once."""
        collectives = {}
        for computation, instruction, times, _ in self._walk(self._entry):
            if kind := _COLLECTIVE.match(instruction.operation):
                channel = _CHANNEL.search(instruction.rest)
                key = kind[1], channel[1] if channel else (computation, instruction.name)
                collectives.setdefault(key, self._collective(computation, instruction, kind[1], times))
        return list(collectives.values())

    def cycles(self) -> Cycles:
        """Returns the sum over all executed instructions. The body of a loop counts once per iteration."""
        total, unestimated = 0.0, collections.Counter()
        for _, instruction, times, counted in self._walk(self._entry):
            if counted:
                continue
            if estimate := _CYCLES.search(instruction.rest):
                total += times * int(estimate[1])
            elif instruction.operation in _UNESTIMATED and _elements(instruction.shape) > _LARGE:
                unestimated[_label(instruction)] += 1
        return Cycles(total, dict(unestimated))

    def _walk(self, computation: str, times: float = 1,
              counted: bool = False) -> Iterator[tuple[str, Instruction, float, bool]]:
        """Yields the instructions of a computation and of the computations that it calls.

        Yields:
          (computation, instruction, number of executions, whether the estimate of an enclosing fusion includes it).
        """
        for instruction in self._computations[computation].values():
            yield computation, instruction, times, counted
            turns = times * (self._trip_count(computation, instruction) if instruction.operation == 'while' else 1)
            inside = counted or instruction.operation == 'fusion'
            for names in _CALLED.findall(instruction.rest):
                for name in names.replace('%', '').split(', '):
                    yield from self._walk(name, turns, inside)

    def _collective(self, computation, instruction, kind, times):
        shapes = _arrays(instruction.shape)
        if instruction.operation.endswith('-start') and kind != 'all-reduce':
            shapes = [shape for shape in shapes if shape != ('u32', 1)]  # internal values of the compiler
            shapes = shapes[len(shapes) // 2:]  # the first half are operands, the second half results
        if kind == 'reduce-scatter':
            shapes = [shape for name in _operands(instruction)
                      for shape in _arrays(self._computations[computation][name].shape)]
        if computation.startswith('all-reduce-scatter'):
            kind = 'reduce-scatter'  # the computation is an all-reduce, but each chip keeps only one slice
        return Collective(kind, times, sum(_width(dtype) * size for dtype, size in shapes))

    def _trip_count(self, computation: str, loop: Instruction) -> float:
        """Returns the number of iterations of a loop with a constant step and limit; NaN for any other loop."""
        called = dict(re.findall(r'\b(condition|body)=%([\w.\-]+)', loop.rest))
        condition, body = (self._computations[called[part]] for part in ('condition', 'body'))
        try:
            test = next(line for line in condition.values() if line.root)
            counter, limit = (condition[name] for name in _operands(test))
            number = int(re.search(r'index=(\d+)', counter.rest)[1])
            root = next(line for line in body.values() if line.root)
            step = next(body[name] for name in _operands(body[_operands(root)[number]])
                        if body[name].operation == 'constant')
            initial = self._computations[computation][_operands(loop)[0]]
            start = self._computations[computation][_operands(initial)[number]]
            while start.operation == 'copy':
                start = self._computations[computation][_operands(start)[0]]
            return math.ceil((_constant(limit) - _constant(start)) / _constant(step))
        except (StopIteration, LookupError, TypeError, ValueError):
            return math.nan


def _label(instruction: Instruction) -> str:
    """Returns the target of a custom call, the name of a fusion, or the operation of any other instruction."""
    if target := _TARGET.search(instruction.rest):
        return target[1]
    return re.sub(r'[.\d]+$', '', instruction.name) if instruction.operation == 'fusion' else instruction.operation


def _operands(instruction: Instruction) -> list[str]:
    return re.findall(r'%([\w.\-]+)', re.split(r'\)(?:,|$)', instruction.rest)[0])


def _constant(instruction: Instruction) -> int:
    if instruction.operation != 'constant':
        raise ValueError(f'{instruction.name} is not a constant')
    return int(re.match(r'-?\d+', instruction.rest)[0])


def _arrays(shape: str) -> list[tuple[str, int]]:
    """Returns the element type and the number of elements of each array."""
    return [(dtype, math.prod(int(size) for size in sizes.split(',') if size))
            for dtype, sizes in _ARRAY.findall(shape)]


def _elements(shape: str) -> int:
    return sum(size for _, size in _arrays(shape))


def _width(dtype: str) -> float:
    """Returns the size of one element in bytes."""
    return 1 if dtype == 'pred' else int(re.search(r'\d+', dtype)[0]) / 8
