"""A restricted pickle interpreter that builds only plain values and inert shells.

A pickle is a program. Python's own unpickler, even with most names refused, passes file bytes to C code that trusts
them: the state of a numpy dtype turns data into object pointers, and a memo index allocates its table. Here each opcode
is Python code over lists and dictionaries. Objects that the file wants to construct become a `Shell`, whose arguments
and state `hmdiff.files.unpickling` reads with checks. Memory is linear in the file's length.

Opcodes: the Python library's `pickletools`. Those for persistent ids, extension codes, sets, keyword construction and
out-of-band buffers are refused: published bodies and labels do not need them.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

MAX_OPERATIONS = 4_000_000  # the largest known label file takes a tenth
_MAX_LINE = 512  # bytes of a number, a memo index, a module or a name
_MAX_INTEGER = 16  # bytes of an integer


class PickleError(Exception):
    """The pickle is damaged or contains something forbidden; the message is one line."""


class Name(NamedTuple):
    """A global named by the pickle. It is never imported."""

    module: str
    name: str


class Shell:
    """An object that was not constructed: its name, arguments and state in the pickle."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: Name, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments = name, arguments
        self.state: Any = None

    def __reduce__(self) -> str:
        raise TypeError("a shell is not pickled again")


def run_pickle(
    content: bytes,
    allowed: Callable[[Name], bool],  # whether an object of this name may become a shell
) -> Any:
    """The value of a pickle: None, numbers, text, bytes, lists, tuples, dictionaries, names and shells, possibly
    shared.

    Raises:
        PickleError: damaged, too long, or with a forbidden opcode or name.
    """
    return _Machine(content, allowed).run()


class _Machine:
    def __init__(self, content: bytes, allowed: Callable[[Name], bool]) -> None:
        self.content, self.allowed = content, allowed
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []  # stack heights
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MAX_OPERATIONS):
            code = self.take(1)
            if code == b".":
                return self.pop()
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise PickleError(f"opcode {code!r} at byte {self.position - 1} is not allowed")
            operation(self)
        raise PickleError(f"more than {MAX_OPERATIONS:,} operations")

    # -- bytes of the file -------------------------------------------------------------------------------------------

    def take(self, size: int) -> bytes:
        start, self.position = self.position, self.position + size
        if self.position > len(self.content):
            raise PickleError("cut short")
        return self.content[start : self.position]

    def number(self, layout: str) -> int:
        value: int = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        if value < 0:
            raise PickleError("a negative length")
        return value

    def line(self, longest: int | None = _MAX_LINE) -> bytes:
        end = self.content.find(b"\n", self.position, None if longest is None else self.position + longest)
        if end < 0:
            raise PickleError("a line without an end")
        found = self.content[self.position : end]
        self.position = end + 1
        return found

    # -- the stack ---------------------------------------------------------------------------------------------------

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        self.top()
        return self.stack.pop()

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise PickleError("nothing on the stack")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise PickleError("no mark on the stack")
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def remember(self, index: int) -> None:
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise PickleError(f"memo {index} is empty")
        self.push(self.memo[index])

    # -- containers --------------------------------------------------------------------------------------------------

    def extend(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, list):
            raise PickleError("items for what is not a list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        # An ordered dictionary stays a shell until it is read: its items are stored as its state.
        if isinstance(target, Shell) and target.name.name == "OrderedDict" and target.state is None:
            target.state = {}
        target = target.state if isinstance(target, Shell) else target
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleError("items for what is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_checked_key(key)] = value

    # -- names and objects -------------------------------------------------------------------------------------------

    def name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise PickleError("a name that is not text")
        found = Name(module, name)
        if not self.allowed(found):
            raise PickleError(f"{module}.{name} is not allowed"[:200])
        self.push(found)

    def construct(self, name: Any, arguments: Any) -> None:
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise PickleError("construction of what is not a name, or without arguments")
        self.push(Shell(name, arguments))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if not isinstance(target, Shell) or target.state is not None:
            raise PickleError("a state for what has none")
        target.state = state


def _checked_key(key: Any) -> Any:
    """Keys are hashed immediately, so they must be plain: deep tuples overflow the C stack, huge integers collide."""
    parts = key if isinstance(key, tuple) else (key,)
    if len(parts) <= 8 and all(
        abs(part) < 2**63 if isinstance(part, int) else isinstance(part, str | bytes) for part in parts
    ):
        return key
    raise PickleError("a dictionary key that is not text, an integer, or a short tuple of these")


def _integer(text: bytes) -> int | bool:
    if text in (b"00", b"01"):  # booleans in protocol 0
        return text == b"01"
    return int(text.removesuffix(b"L"))


def _binary_integer(data: bytes) -> int:
    if len(data) > _MAX_INTEGER:
        raise PickleError(f"an integer of {len(data)} bytes")
    return int.from_bytes(data, "little", signed=True)


def _string(text: bytes) -> str:
    """A quoted, escaped Python 2 string. Published files use latin1, and numpy's data is in such strings too."""
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
        raise PickleError("a string without quotes")
    return codecs.escape_decode(text[1:-1])[0].decode("latin1")  # type: ignore[attr-defined]


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def make(machine: _Machine) -> None:
        items = [machine.pop() for _ in range(count)]
        machine.push(tuple(reversed(items)))

    return make


def _reduce(machine: _Machine) -> None:
    arguments = machine.pop()
    machine.construct(machine.pop(), arguments)


def _old_object(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.construct(items[0] if items else None, tuple(items[1:]))


def _old_instance(machine: _Machine) -> None:
    machine.name(machine.line().decode("ascii"), machine.line().decode("ascii"))
    name = machine.pop()
    machine.construct(name, tuple(machine.pop_mark()))


def _stack_name(machine: _Machine) -> None:
    name = machine.pop()
    machine.name(machine.pop(), name)


def _set_item(machine: _Machine) -> None:
    value = machine.pop()
    machine.set_items([machine.pop(), value])


def _append(machine: _Machine) -> None:
    machine.extend([machine.pop()])


def _pop(machine: _Machine) -> None:
    if machine.marks and len(machine.stack) == machine.marks[-1]:
        machine.marks.pop()
    else:
        machine.pop()


def _forget(items: list[Any]) -> None:
    items.clear()


def _frame(machine: _Machine) -> None:
    machine.number("<q")


_OPERATIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": lambda m: _check_protocol(m.number("<B")),
    b"\x95": _frame,
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"0": _pop,
    b"1": lambda m: _forget(m.pop_mark()),
    b"2": lambda m: m.push(m.top()),
    # numbers
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"I": lambda m: m.push(_integer(m.line())),
    b"L": lambda m: m.push(_integer(m.line())),
    b"J": lambda m: m.push(_binary_integer(m.take(4))),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": lambda m: m.push(_binary_integer(m.take(m.number("<B")))),
    b"\x8b": lambda m: m.push(_binary_integer(m.take(m.number("<i")))),
    b"F": lambda m: m.push(float(m.line())),
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    # text and bytes
    b"S": lambda m: m.push(_string(m.line(None))),
    b"T": lambda m: m.push(m.take(m.number("<i")).decode("latin1")),
    b"U": lambda m: m.push(m.take(m.number("<B")).decode("latin1")),
    b"V": lambda m: m.push(m.line(None).decode("raw-unicode-escape")),
    b"X": lambda m: m.push(m.take(m.number("<I")).decode("utf-8", "surrogatepass")),
    b"\x8c": lambda m: m.push(m.take(m.number("<B")).decode("utf-8", "surrogatepass")),
    b"\x8d": lambda m: m.push(m.take(m.number("<q")).decode("utf-8", "surrogatepass")),
    b"B": lambda m: m.push(m.take(m.number("<I"))),
    b"C": lambda m: m.push(m.take(m.number("<B"))),
    b"\x8e": lambda m: m.push(m.take(m.number("<q"))),
    b"\x96": lambda m: m.push(m.take(m.number("<q"))),  # a bytearray
    # containers
    b"]": lambda m: m.push([]),
    b"l": lambda m: m.push(m.pop_mark()),
    b"a": _append,
    b"e": lambda m: m.extend(m.pop_mark()),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.pop_mark())),
    b"\x85": _tuple_of(1),
    b"\x86": _tuple_of(2),
    b"\x87": _tuple_of(3),
    b"}": lambda m: m.push({}),
    b"d": lambda m: _dictionary(m),
    b"s": _set_item,
    b"u": lambda m: m.set_items(m.pop_mark()),
    # memo
    b"p": lambda m: m.remember(_memo_index(m.line())),
    b"q": lambda m: m.remember(m.number("<B")),
    b"r": lambda m: m.remember(m.number("<I")),
    b"\x94": lambda m: m.remember(len(m.memo)),
    b"g": lambda m: m.recall(_memo_index(m.line())),
    b"h": lambda m: m.recall(m.number("<B")),
    b"j": lambda m: m.recall(m.number("<I")),
    # names and objects
    b"c": lambda m: m.name(m.line().decode("ascii"), m.line().decode("ascii")),
    b"\x93": _stack_name,
    b"R": _reduce,
    b"\x81": _reduce,  # NEWOBJ: a class and its arguments
    b"o": _old_object,
    b"i": _old_instance,
    b"b": lambda m: m.build(),
}


def _dictionary(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.push({})
    machine.set_items(items)


def _memo_index(text: bytes) -> int:
    return int(text)


def _check_protocol(protocol: int) -> None:
    if protocol > 5:
        raise PickleError(f"protocol {protocol}")
