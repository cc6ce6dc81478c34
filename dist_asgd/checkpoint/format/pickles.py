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

from .opcodes import INTS, MAX_GET_BYTES, MEMOIZE_TUPLE2, RECORD, SHORT_CALL, SIZE_OPCODES, int_of


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
    key_types: frozenset[type]


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


def _value_of(value: Any) -> Any:
    """Return the value of an entry of the stack; raises ``Refusal`` for names and records without state."""
    kind = type(value)
    if kind is _Record:
        if value.make is not None:
            raise Refusal("an object that is used before it is made")
        return value.value
    if kind is _Global:
        raise Refusal("a name where a value should be")
    return value


def _values_of(values: list[Any]) -> list[Any]:
    kinds = set(map(type, values))
    return [_value_of(value) for value in values] if _Record in kinds or _Global in kinds else values


class Machine:
    """The stack machine of ``pickle``, with no other opcodes than plain values, records and calls need.

    The entries since a mark are ``_stack``; those before it are in ``_below``, as far as the mark before that.
    """

    def __init__(self, data: bytes, names: Names) -> None:
        self._data = data
        self._names = names
        self._at = 0
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: list[Any] = []
        # What an opcode sequence that makes a size leaves in the memo, the size last. It depends on nothing but its
        # bytes, because what they refer to in the memo never changes.
        self._sizes: dict[bytes, tuple[Any, ...]] = {}
        # Strings by the opcode that pushes them.
        self._keys: dict[bytes, str] = {}

    def run(self) -> Any:
        """Return the one object that the pickle makes; raises ``Refusal`` for anything that DCP does not write."""
        data, opcodes, memo = self._data, self._OPCODES, self._memo
        length = len(data)
        at = 0
        while at < length:
            code = data[at]
            at += 1
            # Nine tenths of all opcodes are these; handling them here saves a function call for each.
            if code == 0x68 or code == 0x6A:  # BINGET, LONG_BINGET
                first = at
                at += 1 if code == 0x68 else 4
                place = int.from_bytes(data[first:at], "little")
                if at > length or place >= len(memo):
                    raise Refusal("a reference to nothing")
                value = memo[place]
                if type(value) is _Global and (end := self._short_call(value, at) or self._record(value, at)):
                    at = end
                else:
                    self._stack.append(value)
            elif code == 0x94:  # MEMOIZE
                if not self._stack:
                    raise Refusal("nothing to remember")
                memo.append(self._stack[-1])
            elif code == 0x8C and at < length:  # SHORT_BINUNICODE
                first = at + 1
                at = first + data[at]
                if at > length:
                    raise Refusal("an end before the end")
                text = str(data[first:at], "utf-8")
                if data.startswith(MEMOIZE_TUPLE2, at) and self._stack:
                    # The last word of a pair.
                    memo.append(text)
                    pair = (_value_of(self._stack[-1]), text)
                    self._stack[-1] = pair
                    memo.append(pair)
                    at += len(MEMOIZE_TUPLE2)
                elif data.startswith(b"\x94", at):
                    self._stack.append(text)
                    memo.append(text)
                    at += 1
                else:
                    self._stack.append(text)
            elif code == 0x29:  # EMPTY_TUPLE
                self._stack.append(())
            elif code == 0x28:  # MARK
                self._below.append(self._stack)
                self._stack = []
            elif code == 0x2E:  # STOP
                want(at == length and len(self._stack) == 1 and not self._below, "something after the end")
                return self._pop()
            else:
                handler = opcodes.get(code)
                if handler is None:
                    raise Refusal(f"opcode 0x{code:02x}")
                self._at = at
                handler(self)
                at = self._at
        raise Refusal("an end before the end")

    def _record(self, name: _Global, at: int) -> int:
        """Push the record of ``name`` that the opcodes from ``at`` on make, and return where these end.

        Returns 0, and changes nothing, if they are of another shape, or if anything in them is not as it should be:
        then they are executed one after the other, which says what.
        """
        found = RECORD.match(self._data, at)
        make = self._names.records.get(name.name) if found is not None else None
        if found is None or make is None:
            return 0
        memo, keys, to_int = self._memo, self._keys, int.from_bytes
        # No opcode may refer to what this record itself has put into the memo.
        known = len(memo)
        fields: dict[str, Any] = {}
        # What the opcodes remember: the record, its dict, and the sizes and new strings in it.
        added: list[Any] = [None, fields]
        key1, text1, key2, text2, key3, text3, list_key = found.groups()
        for key_text, text in ((key1, text1), (key2, text2), (key3, text3)):
            if key_text is None:
                break
            key = keys.get(key_text) or self._key(key_text)
            if key is None or key in fields:
                return 0
            code = text[0]
            if code == 0x68 or code == 0x6A:
                if len(text) > MAX_GET_BYTES:
                    size = self._sizes.get(text) or self._size(text)
                    if size is None:
                        return 0
                    added += size
                    fields[key] = size[-1]
                    continue
                place = to_int(text[1:], "little")
                if place >= known:
                    return 0
                value = memo[place]
                kind = type(value)
                if kind is _Record or kind is _Global:
                    if kind is _Global or value.make is not None:
                        return 0
                    value = value.value
                fields[key] = value
            elif code == 0x4E:
                fields[key] = None
            elif code == 0x8C:
                if text[1] != len(text) - 3:
                    return 0
                fields[key] = str(text[2:-1], "utf-8")
                added.append(fields[key])
            else:
                fields[key] = to_int(text[1:], "little", signed=code == 0x4A)
        if list_key is None:
            added[0] = make(fields)
            memo += added
            self._stack.append(added[0])
            return found.end()
        key, values = keys.get(list_key) or self._key(list_key), list[Any]()
        if key is None:
            return 0
        # As the opcodes leave it: the items are put into the dict when the list is complete.
        added[:2] = record, items = _Record(make), dict[Any, Any]()
        memo += (*added, values)
        self._below.append([*self._stack, record, items])
        self._stack = [*(word for item in fields.items() for word in item), key, values]
        return found.end()

    def _short_call(self, name: _Global, at: int) -> int:
        """Push what a call of ``name`` returns, whose arguments are pushed by the opcodes from ``at`` on.

        Returns where these end, and 0 as ``_record`` does.
        """
        found = SHORT_CALL.match(self._data, at)
        make = self._names.calls.get(name.name) if found is not None else None
        if found is None or make is None:
            return 0
        memo, args = self._memo, list[Any]()
        for text in found.groups():
            if text is None:
                continue
            if text[0] != 0x68 and text[0] != 0x6A:
                args.append(int_of(text))
                continue
            place = int.from_bytes(text[1:], "little")
            if place >= len(memo) or type(memo[place]) is _Record or type(memo[place]) is _Global:
                return 0
            value = memo[place]
            args.append(value)
        self._stack.append(make(tuple(args)))
        return found.end()

    def _key(self, text: bytes) -> str | None:
        """Return the string that an opcode of ``_GET`` pushes; None if it is none."""
        place = int.from_bytes(text[1:], "little")
        key = self._memo[place] if place < len(self._memo) else None
        if type(key) is not str:
            return None
        self._keys[text] = key
        return key

    def _size(self, text: bytes) -> tuple[Any, ...] | None:
        """Return what the opcodes in ``text`` leave in the memo: a tuple unless empty, one around it, the size."""
        found = SIZE_OPCODES.fullmatch(text)
        if found is None:
            return None
        get, _, mark, ints, end = found.groups()
        place = int.from_bytes(get[1:], "little")
        name = self._memo[place] if place < len(self._memo) else None
        make = self._names.calls.get(name.name) if type(name) is _Global else None
        numbers = tuple(map(int_of, INTS.findall(ints or b"")))
        # TUPLE needs its mark, and TUPLE1 to TUPLE3 their number of operands.
        fits = not numbers or (bool(mark) if end == b"t" else not mark and len(numbers) == end[0] - 0x84)
        if make is None or not fits:
            return None
        made = (*((numbers,) if numbers else ()), (numbers,), make((numbers,)))
        self._sizes[text] = made
        return made

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
        if not self._below:
            raise Refusal("a missing mark")
        values, self._stack = self._stack, self._below.pop()
        return _values_of(values)

    def _discard(self) -> None:
        if not self._below:
            raise Refusal("a missing mark")
        self._stack = self._below.pop()

    def _protocol(self) -> None:
        # 4 and 5 are what Python writes by default; the older ones have more opcodes than this machine.
        want(self._take(1)[0] in (4, 5), "a pickle protocol other than 4 and 5")

    def _frame(self) -> None:
        # Its length serves readers of streams; here all bytes are in memory.
        self._take(8)

    def _tuple(self) -> None:
        values = self._pop_to_mark()
        self._stack.append(tuple(values))

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
        # Compared before anything is hashed: hashing a tower of tuples would take for ever.
        want(set(map(type, values[::2])) <= self._names.key_types, "a key that is no name")
        target.update(zip(values[::2], values[1::2], strict=True))
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
        ord("1"): _discard,
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
