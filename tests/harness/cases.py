"""Parametrizes a test over several axes by cases in which every value, or every pair of values, occurs.

``ALL_CASES=1`` in the environment runs every combination.
"""

import os
from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest
from allpairspy import AllPairs

ALL_CASES = os.environ.get("ALL_CASES") == "1"


def every_pair(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test by the names of ``axes``: any two values of any two axes occur together."""
    values = [list(axis) for axis in axes.values()]
    return _parametrize(axes, product(*values) if ALL_CASES else AllPairs(values))


def every_value(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test by as many cases as the longest axis has values.

    Each value occurs, and those that an axis repeats occur more often.
    """
    values = [list(axis) for axis in axes.values()]
    rows = ([axis[row % len(axis)] for axis in values] for row in range(max(map(len, values))))
    return _parametrize(axes, product(*map(_distinct, values)) if ALL_CASES else rows)


def _distinct(values: list[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if value not in values[:index]]


def _parametrize(names: Iterable[str], rows: Iterable[Iterable[Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(list(names), [tuple(row) for row in rows], ids=str)
