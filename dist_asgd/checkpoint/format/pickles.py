"""A stack machine for pickles of one known kind: no class is looked up by name, and nothing is called but makers.

A *record* is an object that the pickle creates empty and then gives its state: its maker turns the state into the
real object. A *call* is made of its arguments at once. A *constant* stands for itself. Makers check what they get,
and raise ``Refused`` for the rest; the opcodes are those that pickles of plain values and such objects hold.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


class Refused(Exception):
    """What is in the pickle that should not be there."""


def want(ok: bool, what: str) -> None:
    """Refused unless ``ok``."""
    if not ok:
        raise Refused(what)


Name = tuple[str, str]
Maker = Callable[[Any], Any]


@dataclass(frozen=True)
class Vocabulary:
    """The (module, name) pairs that a pickle may use, and the types that its dicts may have as keys."""

    constants: Mapping[Name, Any]
    calls: Mapping[Name, Maker]
    records: Mapping[Name, Maker]
    stateless: Mapping[Name, Callable[[], Any]]
    key_types: tuple[type, ...]


class _Made:
    """An object of the pickle: named when it is created, given its value when its state arrives."""

    __slots__ = ("make", "value")

    def __init__(self, make: Maker) -> None:
        self.make: Maker | None = make
        self.value: Any = None


class _Global:
    """A name that the pickle refers to; one of those above."""

    __slots__ = ("name",)

    def __init__(self, name: Name) -> None:
        self.name = name


_MARK = object()


def _finished(value: Any) -> Any:
    """What the pickle may use as a value, of what is on its stack."""
    kind = type(value)
    if kind is _Made:
        if value.make is not None:
            raise Refused("an object that is used before it is made")
        return value.value
    if value is _MARK or kind is _Global:
        raise Refused("a mark or a name where a value should be")
    return value


class Machine:
    """The stack machine of ``pickle``, with the opcodes that plain values and records need."""

    def __init__(self, data: bytes, vocabulary: Vocabulary) -> None:
        self._data = data
        self._vocabulary = vocabulary
        self._at = 0
        self._stack: list[Any] = []
        self._memo: list[Any] = []

    def run(self) -> Any:
        """The one object that the pickle makes; Refused where it wants anything else than the vocabulary has."""
        data, opcodes, stack, memo = self._data, self._OPCODES, self._stack, self._memo
        length = len(data)
        while self._at < length:
            code = data[self._at]
            self._at += 1
            # Two thirds of all opcodes are these, so they are here; no function is called for them.
            if code == 0x94:  # MEMOIZE
                if not stack or stack[-1] is _MARK:
                    raise Refused("nothing to remember")
                memo.append(stack[-1])
            elif code == 0x68 or code == 0x6A:  # BINGET, LONG_BINGET
                first = self._at
                self._at += 1 if code == 0x68 else 4
                place = int.from_bytes(data[first : self._at], "little")
                if self._at > length or place >= len(memo):
                    raise Refused("a reference to nothing")
                stack.append(memo[place])
            elif code == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif code == 0x28:  # MARK
                stack.append(_MARK)
            elif code == 0x2E:  # STOP
                want(self._at == length and len(stack) == 1, "something after the end")
                return self._pop()
            else:
                handler = opcodes.get(code)
                if handler is None:
                    raise Refused(f"opcode 0x{code:02x}")
                handler(self)
        raise Refused("an end before the end")

    def _take(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > len(self._data):
            raise Refused("an end before the end")
        return self._data[start : self._at]

    def _pop(self) -> Any:
        """The top of the stack as a finished value."""
        if not self._stack:
            raise Refused("a missing operand")
        return _finished(self._stack.pop())

    def _pop_to_mark(self) -> list[Any]:
        stack = self._stack
        for at in range(len(stack) - 1, -1, -1):
            if stack[at] is _MARK:
                values = [_finished(value) for value in stack[at + 1 :]]
                del stack[at:]
                return values
        raise Refused("a missing mark")

    def _protocol(self) -> None:
        want(self._take(1)[0] in (4, 5), "a pickle protocol other than 4 and 5")

    def _frame(self) -> None:
        self._take(8)

    def _tuple(self) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def _tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise Refused("a missing operand")
        self._stack[-count:] = [tuple(map(_finished, self._stack[-count:]))]

    def _string(self, count: int) -> None:
        length = int.from_bytes(self._take(count), "little")
        self._stack.append(str(self._take(length), "utf-8"))

    def _int(self, count: int) -> None:
        self._stack.append(int.from_bytes(self._take(count), "little", signed=count == 4))

    def _long(self) -> None:
        count = self._take(1)[0]
        want(count <= 9, "a number beyond 64 bits")
        self._stack.append(int.from_bytes(self._take(count), "little", signed=True))

    def _append(self, values: list[Any]) -> None:
        want(bool(self._stack) and type(self._stack[-1]) is list, "an append to something else than a list")
        self._stack[-1].extend(values)

    def _set(self, values: list[Any]) -> None:
        want(bool(self._stack) and type(self._stack[-1]) is dict and len(values) % 2 == 0, "items of no dict")
        target, key_types = self._stack[-1], self._vocabulary.key_types
        num_keys = len(target) + len(values) // 2
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in key_types:
                raise Refused("a key that is no name")
            target[key] = value
        want(len(target) == num_keys, "a key that occurs twice")

    def _set_one(self) -> None:
        value = self._pop()
        self._set([self._pop(), value])

    def _find(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise Refused("a name that is no string")
        known, full = self._vocabulary, (module, name)
        if full in known.constants:
            self._stack.append(known.constants[full])
        elif full in known.records or full in known.calls or full in known.stateless:
            self._stack.append(_Global(full))
        else:
            raise Refused(f"{module[:80]}.{name[:80]}")

    def _name(self) -> Name:
        found = self._stack.pop() if self._stack else None
        if type(found) is not _Global:
            raise Refused("a call of something that has no name")
        return found.name

    def _create(self) -> None:
        args, name = self._pop(), self._name()
        want(args == (), "an object with arguments")
        if name in self._vocabulary.records:
            self._stack.append(_Made(self._vocabulary.records[name]))
        elif name in self._vocabulary.stateless:
            self._stack.append(self._vocabulary.stateless[name]())
        else:
            raise Refused(f"an object of {'.'.join(name)}")

    def _call(self) -> None:
        args, name = self._pop(), self._name()
        make = self._vocabulary.calls.get(name)
        if make is None:
            raise Refused(f"a call of {'.'.join(name)}")
        self._stack.append(make(args))

    def _build(self) -> None:
        state = self._pop()
        made = self._stack[-1] if self._stack else None
        if type(made) is not _Made or made.make is None:
            raise Refused("state for something that takes none")
        made.value, made.make = made.make(state), None

    _OPCODES: Mapping[int, Callable[[Machine], None]] = {
        0x80: _protocol,
        0x95: _frame,
        ord("}"): lambda self: self._stack.append({}),
        ord("]"): lambda self: self._stack.append([]),
        ord("N"): lambda self: self._stack.append(None),
        0x88: lambda self: self._stack.append(True),
        0x89: lambda self: self._stack.append(False),
        ord("t"): _tuple,
        0x85: lambda self: self._tuple_of(1),
        0x86: lambda self: self._tuple_of(2),
        0x87: lambda self: self._tuple_of(3),
        0x8C: lambda self: self._string(1),
        ord("X"): lambda self: self._string(4),
        ord("K"): lambda self: self._int(1),
        ord("M"): lambda self: self._int(2),
        ord("J"): lambda self: self._int(4),
        0x8A: _long,
        ord("a"): lambda self: self._append([self._pop()]),
        ord("e"): lambda self: self._append(self._pop_to_mark()),
        ord("s"): _set_one,
        ord("u"): lambda self: self._set(self._pop_to_mark()),
        0x93: _find,
        0x81: _create,
        ord("R"): _call,
        ord("b"): _build,
    }


# --- the cost of reading a pickle ------------------------------------------------------------------------

_COST_MARK = -1
_FREE_SIZE = 1 << 20
# Values popped, besides those up to a mark; and whether one is pushed, or the rest added to the one below.
_MAKES: Mapping[str, int] = {
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "REDUCE": 2,
    "NEWOBJ": 2,
    "BINPERSID": 1,
}
_ADDS: Mapping[str, int] = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}
_PUTS = ("BINPUT", "LONG_BINPUT")
_GETS = ("BINGET", "LONG_BINGET")
_NOTHING = ("PROTO", "STOP")
# Callable by number: a size of the attacker's choice.
_REFUSED_NAMES = ("builtins bytearray", "__builtin__ bytearray", "builtins bytes", "__builtin__ bytes")


def check_cost(pickle: bytes) -> None:
    """ValueError where reading ``pickle`` could take more than its length allows, or it is none that torch writes."""
    limit = _FREE_SIZE + 4 * len(pickle)
    stack: list[int] = []
    memo: dict[int, int] = {}

    def pop_to_mark() -> int:
        total = 0
        while (size := stack.pop()) != _COST_MARK:
            total += size
        return total

    try:
        for opcode, arg, _ in pickletools.genops(pickle):
            name = opcode.name
            if name in _NOTHING:
                continue
            if name == "MARK":
                stack.append(_COST_MARK)
                continue
            if name in _PUTS:
                memo[int(arg or 0)] = stack[-1]
                continue
            if name in _GETS:
                stack.append(memo[int(arg or 0)])
            elif name in _MAKES:
                stack.append(1 + sum(stack.pop() for _ in range(_MAKES[name])))
            elif name in _ADDS:
                added = sum(stack.pop() for _ in range(_ADDS[name]))
                stack[-1] += added
            elif name == "TUPLE":
                stack.append(1 + pop_to_mark())
            elif name in ("APPENDS", "SETITEMS"):
                added = pop_to_mark()
                stack[-1] += added
            elif not opcode.stack_before and len(opcode.stack_after) == 1:
                if name == "GLOBAL" and arg in _REFUSED_NAMES:
                    raise ValueError(f"it calls {arg}, which takes any number of bytes")
                stack.append(1)
            else:
                raise ValueError(f"it has the opcode {name}, which torch does not write")
            if stack[-1] > limit:
                raise ValueError("its values hold each other so often that reading them would take for ever")
    except (IndexError, KeyError) as error:
        raise ValueError("its pickle takes what it has not put") from error
