"""A look at a pickle before torch's ``weights_only`` loader reads it: it must not cost more than it is long.

That loader runs nothing it should not, but a few bytes can make it take any time or memory: tuples of twice the same
tuple, sixty deep, as the key of a dict; ``bytearray`` of any number. Here the opcodes are walked with the size of each
value in place of the value, shared parts counted as often as they occur.
"""

from __future__ import annotations

import pickletools
from collections.abc import Mapping

_MARK = -1
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
        while (size := stack.pop()) != _MARK:
            total += size
        return total

    try:
        for opcode, arg, _ in pickletools.genops(pickle):
            name = opcode.name
            if name in _NOTHING:
                continue
            if name == "MARK":
                stack.append(_MARK)
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
