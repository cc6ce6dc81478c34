"""Opcodes of pickles that follow each other in DCP's ``.metadata``, for ``pickles`` and ``metadata_writer``.

An opcode is a byte, and what it takes follows it.
"""

from __future__ import annotations

import re

# --- reading ---------------------------------------------------------------------------------------------

# A metadata file has hundreds of opcodes for each parameter. Most belong to records of the shape
#   name, empty object, empty dict, mark, (key, value) up to three times, set items, build
# where keys and most values were remembered before, and strings among the values may be new. One match of ``RECORD``
# stands for twenty opcodes. It also matches the beginning of a record whose last value is a list.
_GET = rb"h.|j.{4}"
_INT = rb"K.|M..|J.{4}"
_START = b")\x81\x94}\x94("
_SIZE = rb"(?:%b)(?:\)|\(?(?:%b)+[\x85-\x87t]\x94)\x85\x94R\x94" % (_GET, _INT)
# Its length is compared later: a string with the byte of MEMOIZE in it is not matched.
_TEXT = rb"\x8c.[^\x94]{0,255}\x94"
_ITEM = rb"(%b)(%b|%b|%b|N|%b)" % (_GET, _SIZE, _GET, _INT, _TEXT)
RECORD = re.compile(rb"%b%b(?:%b(?:%b)?)?(?:ub|(%b)\]\x94)" % (re.escape(_START), _ITEM, _ITEM, _ITEM, _GET), re.DOTALL)
SIZE_OPCODES = re.compile(rb"(%b)(\)|(\(?)((?:%b)+)([\x85-\x87t])\x94)\x85\x94R\x94" % (_GET, _INT), re.DOTALL)
INTS = re.compile(_INT, re.DOTALL)
# The call of a name with one, two or three arguments, which were remembered before or are short numbers: so
# ``metadata_writer`` writes all that there is of each chunk.
SHORT_CALL = re.compile(rb"(%b)(?:(%b)\x86|(%b)(%b)\x87|\x85)R" % (_GET, _GET, _INT, _INT), re.DOTALL)
MAX_GET_BYTES = 5
MEMOIZE_TUPLE2 = b"\x94\x86\x94"


def int_of(opcode: bytes) -> int:
    """Return the number that an opcode of ``INTS`` pushes."""
    return int.from_bytes(opcode[1:], "little", signed=opcode[0] == 0x4A)


# --- writing ---------------------------------------------------------------------------------------------

PROTOCOL, STOP, MARK, POP_MARK = b"\x80\x04", b".", b"(", b"1"
EMPTY_DICT, SET_ITEMS, EMPTY_LIST, APPENDS, NONE, FALSE = b"}", b"u", b"]", b"e", b"N", b"\x89"
EMPTY_TUPLE, TUPLE, MEMOIZE, GLOBAL, CALL, CREATE, BUILD = b")", b"t", b"\x94", b"\x93", b"R", b"\x81", b"b"
TUPLES = (EMPTY_TUPLE, b"\x85", b"\x86", b"\x87")


def text_of(text: str) -> bytes:
    """Return the opcode that pushes a string."""
    data = text.encode()
    return b"\x8c" + bytes([len(data)]) + data if len(data) < 256 else b"X" + len(data).to_bytes(4, "little") + data


def word_of(word: str | int) -> bytes:
    """Return the opcode that pushes a word of a path."""
    return text_of(word) if isinstance(word, str) else number_of(word)


def name_of(module: str, name: str) -> bytes:
    """Return the opcodes that look up a name."""
    return text_of(module) + text_of(name) + GLOBAL


def get_of(number: int) -> bytes:
    """Return the opcode that pushes what was remembered under this number."""
    return b"h" + bytes([number]) if number < 256 else b"j" + number.to_bytes(4, "little")


def number_of(number: int) -> bytes:
    """Return the opcode that pushes a number of at most 64 bits."""
    if 0 <= number < 256:
        return b"K" + bytes([number])
    if 0 <= number < 1 << 16:
        return b"M" + number.to_bytes(2, "little")
    if -(1 << 31) <= number < 1 << 31:
        return b"J" + number.to_bytes(4, "little", signed=True)
    return b"\x8a\x08" + number.to_bytes(8, "little", signed=True)
