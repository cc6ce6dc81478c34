"""The stack machine of ``pickle`` without ``pickle``: it looks up no class, and calls nothing but given makers.

``metadata.parse`` runs it on DCP's ``.metadata``.

record     an object that the pickle creates empty and then gives its state
call       an object that the pickle makes of its arguments at once
constant   a name that stands for one value, such as ``torch.float32``
maker      a function that turns the state of a record, or the arguments of a call, into the real object; it checks them
           and raises ``Refusal`` if they are not as they should be
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


class Refusal(Exception):
    """The pickle holds something that it should not hold; the message completes the sentence "it holds ..."."""


class UnknownNameError(Refusal):
    """The pickle looks up a name that is not in ``Names``."""

    def __init__(self, name: Name) -> None:
        super().__init__(f"{name[0][:80]}.{name[1][:80]}")
        self.name = name


def want(ok: bool, what: str) -> None:
    """Raise ``Refusal`` unless ``ok``."""
    if not ok:
        raise Refusal(what)


Name = tuple[str, str]
"""Module and name of a class, function or constant, as pickles have them."""
Maker = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Names:
    """The names that a pickle may look up, each with its value or maker, and the types that keys of dicts may have."""

    constants: Mapping[Name, Any]
    calls: Mapping[Name, Maker]
    records: Mapping[Name, Maker]
    stateless: Mapping[Name, Callable[[], Any]]
    key_types: tuple[type, ...]


class _Record:
    """A record on the stack: ``make`` is its maker until its state arrives, then None; ``value`` is the result."""

    __slots__ = ("make", "value")

    def __init__(self, make: Maker) -> None:
        self.make: Maker | None = make
        self.value: Any = None


class _Global:
    """A name on the stack, one of ``Names``."""

    __slots__ = ("name",)

    def __init__(self, name: Name) -> None:
        self.name = name


_MARK = object()


def _value_of(value: Any) -> Any:
    """Return the value of an entry of the stack; raises ``Refusal`` for marks, names and records without state."""
    kind = type(value)
    if kind is _Record:
        if value.make is not None:
            raise Refusal("an object that is used before it is made")
        return value.value
    if value is _MARK or kind is _Global:
        raise Refusal("a mark or a name where a value should be")
    return value


class Machine:
    """The stack machine of ``pickle``, with no other opcodes than plain values, records and calls need."""

    def __init__(self, data: bytes, names: Names) -> None:
        self._data = data
        self._names = names
        self._at = 0
        self._stack: list[Any] = []
        self._memo: list[Any] = []

    def run(self) -> Any:
        """Return the one object that the pickle makes; raises ``Refusal`` for anything that DCP does not write."""
        data, opcodes, stack, memo = self._data, self._OPCODES, self._stack, self._memo
        length = len(data)
        while self._at < length:
            code = data[self._at]
            self._at += 1
            # Two thirds of all opcodes are these; handling them here saves a function call for each.
            if code == 0x94:  # MEMOIZE
                if not stack or stack[-1] is _MARK:
                    raise Refusal("nothing to remember")
                memo.append(stack[-1])
            elif code == 0x68 or code == 0x6A:  # BINGET, LONG_BINGET
                first = self._at
                self._at += 1 if code == 0x68 else 4
                place = int.from_bytes(data[first : self._at], "little")
                if self._at > length or place >= len(memo):
                    raise Refusal("a reference to nothing")
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
                    raise Refusal(f"opcode 0x{code:02x}")
                handler(self)
        raise Refusal("an end before the end")

    def _take(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > len(self._data):
            raise Refusal("an end before the end")
        return self._data[start : self._at]

    def _pop(self) -> Any:
        """Pop the top of the stack as a value."""
        if not self._stack:
            raise Refusal("a missing operand")
        return _value_of(self._stack.pop())

    def _pop_to_mark(self) -> list[Any]:
        stack = self._stack
        for at in range(len(stack) - 1, -1, -1):
            if stack[at] is _MARK:
                values = [_value_of(value) for value in stack[at + 1 :]]
                del stack[at:]
                return values
        raise Refusal("a missing mark")

    def _protocol(self) -> None:
        # 4 and 5 are what Python writes by default; the older ones have more opcodes than this machine.
        want(self._take(1)[0] in (4, 5), "a pickle protocol other than 4 and 5")

    def _frame(self) -> None:
        # Its length serves readers of streams; here all bytes are in memory.
        self._take(8)

    def _tuple(self) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def _tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise Refusal("a missing operand")
        self._stack[-count:] = [tuple(map(_value_of, self._stack[-count:]))]

    def _string(self, count: int) -> None:
        length = int.from_bytes(self._take(count), "little")
        self._stack.append(str(self._take(length), "utf-8"))

    def _int(self, count: int) -> None:
        self._stack.append(int.from_bytes(self._take(count), "little", signed=count == 4))

    def _long(self) -> None:
        count = self._take(1)[0]
        # 8 bytes, and one for the sign: DCP writes no longer numbers.
        want(count <= 9, "a number beyond 64 bits")
        self._stack.append(int.from_bytes(self._take(count), "little", signed=True))

    def _append(self, values: list[Any]) -> None:
        want(bool(self._stack) and type(self._stack[-1]) is list, "an append to something else than a list")
        self._stack[-1].extend(values)

    def _set(self, values: list[Any]) -> None:
        want(bool(self._stack) and type(self._stack[-1]) is dict and len(values) % 2 == 0, "items of no dict")
        target = self._stack[-1]
        num_keys = len(target) + len(values) // 2
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in self._names.key_types:
                raise Refusal("a key that is no name")
            target[key] = value
        # pickle would let the second value replace the first.
        want(len(target) == num_keys, "a key that occurs twice")

    def _set_one(self) -> None:
        value = self._pop()
        self._set([self._pop(), value])

    def _find(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise Refusal("a name that is no string")
        # The name is looked up in the tables, and never imported.
        full, names = (module, name), self._names
        if full in names.constants:
            self._stack.append(names.constants[full])
        elif full in names.records or full in names.calls or full in names.stateless:
            self._stack.append(_Global(full))
        else:
            raise UnknownNameError(full)

    def _name(self) -> Name:
        found = self._stack.pop() if self._stack else None
        if type(found) is not _Global:
            raise Refusal("a call of something that has no name")
        return found.name

    def _create(self) -> None:
        args, name = self._pop(), self._name()
        want(args == (), "an object with arguments")
        if name in self._names.records:
            self._stack.append(_Record(self._names.records[name]))
        elif name in self._names.stateless:
            self._stack.append(self._names.stateless[name]())
        else:
            raise Refusal(f"an object of {'.'.join(name)}")

    def _call(self) -> None:
        args, name = self._pop(), self._name()
        make = self._names.calls.get(name)
        if make is None:
            raise Refusal(f"a call of {'.'.join(name)}")
        self._stack.append(make(args))

    def _build(self) -> None:
        state = self._pop()
        made = self._stack[-1] if self._stack else None
        if type(made) is not _Record or made.make is None:
            raise Refusal("state for something that takes none")
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
