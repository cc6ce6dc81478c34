"""Text for errors about values that differ between ranks: which ranks have which, and what differs first."""

from __future__ import annotations

from collections.abc import Sequence


def describe_ranks(ranks: Sequence[int]) -> str:
    """Return text for an error: ``rank 3`` or ``ranks 0-2, 5``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"


def ranks_by_value(values: Sequence[object]) -> dict[object, list[int]]:
    """Return the ranks that have each value, in rank order."""
    ranks: dict[object, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ranks


def values_by_rank(values: Sequence[object]) -> str:
    """Return text for an error that groups ranks by their value: ``ranks 0-1 have 3; rank 2 has 4``."""
    return "; ".join(
        f"{describe_ranks(ranks)} {'has' if len(ranks) == 1 else 'have'} {value}"
        for value, ranks in ranks_by_value(values).items()
    )


def first_difference(by_rank: Sequence[Sequence[tuple[str, object]]]) -> str:
    """Return the sentence about the first difference between all ranks' entries."""
    for position in range(max(len(entries) for entries in by_rank)):
        row = [entries[position] if position < len(entries) else ("nothing", "") for entries in by_rank]
        if len(set(map(repr, row))) > 1:
            labels = {label for label, _ in row}
            if len(labels) == 1:
                return f" {row[0][0]}: {values_by_rank([str(value) for _, value in row])}."
            return f" entry {position}: {values_by_rank([f'{label} {value}' for label, value in row])}."
    return ""
