"""Reading a pickle as plain data, without importing or calling anything that it names.

The module `pickle` runs what a file tells it to run. An allow-list of classes is not enough: the opcode BUILD can
still change an admitted class for the whole process. This reader interprets the opcodes itself. A class or function
becomes a `Global`, which is its name; a call, and an instance with its state, become a `Node`. Nothing else is created
but numbers, strings, tuples, lists and dictionaries.

A dictionary becomes a `Pairs`, a list of (key, value), and a set becomes a list: hashing a hostile key could take for
ever. Values may refer to
each other without end, so callers must not walk through them recursively, compare them or print them.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import Any

from megatron_vcr1.errors import UserError


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Global:
    """The name of a class, a function or a constant."""

    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


class Pairs(list[tuple[Any, Any]]):
    """The items of a dictionary, in the order of the file."""


@dataclass(slots=True, eq=False, repr=False)
class Node:
    """A call of a function or class, or an instance of a class."""

    function: Global
    args: tuple[Any, ...]
    state: Any = None  # None: the pickle sets none
    items: Pairs = field(default_factory=Pairs)  # of a class that is a dictionary


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_VALUES |= {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
_TUPLE_LENGTHS = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK: Any = object()


def load_plain(data: bytes, where: object) -> Any:
    """Read a pickle of protocol 2 or newer as plain data.

    Args:
        data: the pickle.
        where: the file, for error messages.

    Raises:
        UserError: the pickle is damaged, or uses opcodes that data and dataclasses do not need.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                (result,) = machine.stack  # ValueError unless one value is left
                if result is _MARK:
                    raise ValueError("no value")
                return result
            machine.run(opcode.name, argument)
    # What pickletools and the stack machine raise for damaged bytes.
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{where}: refused or damaged: not a pickle of plain data ({error})") from None
    raise UserError(f"{where}: refused or damaged: it ends too early")


class _Machine:
    """The stack and the memo of a pickle that is being read."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        """Run one opcode. Raises ValueError, IndexError, KeyError or TypeError if it cannot be run."""
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLE_LENGTHS:
            stack.append(tuple(self._pop_last(_TUPLE_LENGTHS[name])))
        elif name == "TUPLE":
            stack.append(tuple(self._pop_to_mark()))
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            self._memo[len(self._memo) if argument is None else argument] = self._top(object)
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in ("EMPTY_LIST", "EMPTY_SET"):
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append(Pairs())
        elif name == "FROZENSET":
            stack.append(self._pop_to_mark())
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            values = self._pop_last(1) if name == "APPEND" else self._pop_to_mark()
            self._list().extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = self._pop_last(2) if name == "SETITEM" else self._pop_to_mark()
            self._pairs().extend(zip(values[::2], values[1::2], strict=True))
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            stack.append(Global(module, attribute))
        elif name == "STACK_GLOBAL":
            module, attribute = self._pop_last(2)
            if not (isinstance(module, str) and isinstance(attribute, str)):
                raise ValueError("a name is not a string")
            stack.append(Global(module, attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            function, args = self._pop_last(2)
            if not isinstance(function, Global) or type(args) is not tuple:
                raise ValueError(f"{name} of something else than a named class or function")
            stack.append(Node(function, args))
        elif name == "BUILD":
            (state,) = self._pop_last(1)
            node = self._top(Node)
            if node.state is not None:
                raise ValueError("BUILD sets the state of an instance twice")
            node.state = state
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"opcode {name}")

    def _top(self, kind: type[Any]) -> Any:
        value = self.stack[-1]
        if value is _MARK or not isinstance(value, kind):
            raise ValueError(f"an opcode finds no {kind.__name__} on the stack")
        return value

    def _list(self) -> list[Any]:
        value: list[Any] = self._top(list)
        if isinstance(value, Pairs):
            raise ValueError("a value is appended to a dictionary")
        return value

    def _pairs(self) -> Pairs:
        value = self._top(object)
        if not isinstance(value, Pairs | Node):
            raise ValueError("an item is set in something else than a dictionary")
        return value.items if isinstance(value, Node) else value

    def _pop_last(self, count: int) -> list[Any]:
        values = self.stack[len(self.stack) - count :] if count else []
        if len(values) != count or any(value is _MARK for value in values):
            raise ValueError("the stack is too short")
        if count:
            del self.stack[-count:]
        return values

    def _pop_to_mark(self) -> list[Any]:
        values: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]
