"""The snippets of the README and of the pages in docs/ run as they stand.

A Python block is run if a comment ``<!-- test -->`` (one process, no group) or ``<!-- test: N ranks -->`` (Gloo
processes) stands right before it. Later blocks of a page see the names of its earlier ones with the same number of
ranks; each page starts anew.
"""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.harness.ranks import run

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"<!-- test(?:: (\d+) ranks)? -->\s*```python\n(.*?)```", re.DOTALL)


def snippets(page: Path) -> dict[int, list[str]]:
    """A page's snippets by number of ranks, in the order in which they stand."""
    found: dict[int, list[str]] = {}
    for ranks, code in BLOCK.findall(page.read_text()):
        found.setdefault(int(ranks or 1), []).append(code)
    return found


CASES = [
    pytest.param(page.name, ranks, codes, id=f"{page.stem}-{ranks}")
    for page in PAGES
    for ranks, codes in snippets(page).items()
]


def execute(_rank: int, _world_size: int, name: str, codes: list[str], folder: str) -> None:
    """Job: one snippet after another, in one namespace, in a folder of their own."""
    namespace: dict[str, Any] = {"__name__": "snippets"}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for number, code in enumerate(codes):
            exec(compile(code, f"{name}, snippet {number}", "exec"), namespace)
    finally:
        os.chdir(before)


@pytest.mark.parametrize(("name", "ranks", "codes"), CASES)
def test_snippets_run(name: str, ranks: int, codes: list[str]) -> None:
    """In the order in which a reader meets them."""
    with tempfile.TemporaryDirectory() as folder:
        run("none" if ranks == 1 else "gloo", ranks, execute, name, codes, folder)


def test_there_are_snippets_for_one_and_for_several_ranks() -> None:
    """Otherwise the test above would test nothing."""
    ranks = {ranks for page in PAGES for ranks in snippets(page)}
    assert 1 in ranks
    assert max(ranks) > 1
    assert snippets(PAGES[0]), "the README has no snippets that run"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_snippet_is_left_out(page: Path) -> None:
    """A Python block without a comment before it would not run."""
    assert page.read_text().count("```python\n") == sum(map(len, snippets(page).values()))
