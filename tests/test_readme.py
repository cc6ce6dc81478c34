"""The README's snippets run as they stand.

A Python block is run if a comment ``<!-- test -->`` (one process, no group) or ``<!-- test: N ranks -->`` (Gloo
processes) stands right before it. Later blocks see the names of earlier ones with the same number of ranks.
"""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.harness.ranks import run

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"<!-- test(?:: (\d+) ranks)? -->\s*```python\n(.*?)```", re.DOTALL)


def snippets() -> dict[int, list[str]]:
    """Snippets by number of ranks, in the order in which they stand."""
    found: dict[int, list[str]] = {}
    for ranks, code in BLOCK.findall(README.read_text() if README.exists() else ""):
        found.setdefault(int(ranks or 1), []).append(code)
    return found


def execute(_rank: int, _world_size: int, codes: list[str], folder: str) -> None:
    """Job: one snippet after another, in one namespace, in a folder of their own."""
    namespace: dict[str, Any] = {"__name__": "readme"}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for number, code in enumerate(codes):
            exec(compile(code, f"README.md, snippet {number}", "exec"), namespace)
    finally:
        os.chdir(before)


@pytest.mark.parametrize(("ranks", "codes"), snippets().items(), ids=lambda value: str(value)[:1])
def test_snippets_run(ranks: int, codes: list[str]) -> None:
    """In the order in which a reader meets them."""
    with tempfile.TemporaryDirectory() as folder:
        run("none" if ranks == 1 else "gloo", ranks, execute, codes, folder)


def test_the_readme_has_snippets_for_one_and_for_several_ranks() -> None:
    """Otherwise the test above would test nothing."""
    found = snippets()
    assert 1 in found
    assert any(ranks > 1 for ranks in found)
