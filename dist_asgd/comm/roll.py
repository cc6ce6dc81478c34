"""The roll: which ranks of a group wait in one exchange, kept in the group's store for errors and the log only.

An exchange tells a rank nothing of those that are not its neighbours. A rank that has waited for long, or whose wait
has failed, writes its name down, and reads which names are missing. Nothing of it is on the path of a step.
"""

from __future__ import annotations

from torch._C._distributed_c10d import Store

# Ranks share an integer of the store, one bit for each.
_BITS = 62


class Roll:
    """The names of the ranks that wait in one exchange, by position in the group. No method is collective.

    Methods raise RuntimeError if the store fails.
    """

    def __init__(self, store: Store, prefix: str, rank: int, world_size: int) -> None:
        """``prefix`` begins the keys in ``store``, and is that of one exchange. No communication."""
        self._store, self._prefix = store, prefix
        self._rank, self._world_size = rank, world_size
        self._is_written = False

    def write(self) -> None:
        """Write down that this rank waits; only the first call does something."""
        if not self._is_written:
            word, bit = divmod(self._rank, _BITS)
            self._store.add(self._key(word), 1 << bit)
            self._is_written = True

    def missing(self) -> list[int]:
        """Return the ranks that have not written themselves down."""
        words = [self._store.add(self._key(word), 0) for word in range(-(-self._world_size // _BITS))]
        return [rank for rank in range(self._world_size) if not words[rank // _BITS] >> rank % _BITS & 1]

    def erase(self) -> None:
        """Delete what ranks have written; called when the wait is over, and does nothing on most ranks."""
        if self._is_written and self._rank % _BITS == 0:
            self._store.delete_key(self._key(self._rank // _BITS))

    def _key(self, word: int) -> str:
        return f"{self._prefix}/{word}"
