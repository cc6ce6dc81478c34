"""How errors name ranks: by their numbers in the default group, which is how a job's logs and launchers name them.

A process group may have some ranks of the job only, and tables that ranks exchange have one row for each of them, in
the group's order. ``RankNames`` translates the positions in such a table. ``Agreement`` and ``Communicators`` have one.
"""

from __future__ import annotations

from collections.abc import Sequence


class RankNames:
    """The names of a group's ranks. Methods take positions in the group, from 0 on."""

    def __init__(self, ranks: Sequence[int]) -> None:
        """``ranks`` are the group's ranks as ranks of the default group, in the group's order."""
        self._ranks = list(ranks)

    def __len__(self) -> int:
        return len(self._ranks)

    def describe(self, positions: Sequence[int]) -> str:
        """Return text for an error: ``rank 3`` or ``ranks 0-2, 5``."""
        return _describe([self._ranks[position] for position in positions])

    @property
    def total(self) -> str:
        """What follows "rank 1 of": how many ranks there are, or which, if they are not simply the first ones."""
        first_ones = self._ranks == list(range(len(self._ranks)))
        return str(len(self._ranks)) if first_ones else _describe(self._ranks)

    def place(self, position: int) -> str:
        """Return text for an error about one rank: ``rank 1 of 4``, or ``rank 2 of ranks 0, 2``."""
        return f"{self.describe([position])} of {self.total}"

    def by_value(self, values: Sequence[object]) -> str:
        """Return text for an error that groups ranks by their value: ``ranks 0-1 have 3; rank 2 has 4``."""
        return "; ".join(
            f"{self.describe(positions)} {'has' if len(positions) == 1 else 'have'} {value}"
            for value, positions in positions_by_value(values).items()
        )

    def first_difference(self, by_rank: Sequence[Sequence[tuple[str, object]]]) -> str:
        """Return the sentence about the first difference between all ranks' (label, value) entries."""
        for position in range(max(len(entries) for entries in by_rank)):
            row = [entries[position] if position < len(entries) else ("nothing", "") for entries in by_rank]
            if len(set(map(repr, row))) > 1:
                labels = {label for label, _ in row}
                if len(labels) == 1:
                    return f" {row[0][0]}: {self.by_value([str(value) for _, value in row])}."
                return f" entry {position}: {self.by_value([f'{label} {value}' for label, value in row])}."
        return ""


def positions_by_value(values: Sequence[object]) -> dict[object, list[int]]:
    """Return the positions in ``values`` at which each value stands, in the order of first appearance."""
    positions: dict[object, list[int]] = {}
    for position, value in enumerate(values):
        positions.setdefault(value, []).append(position)
    return positions


def _describe(ranks: Sequence[int]) -> str:
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
