"""The tables of scenarios in docs/trainers: they agree with each other, and a run fails in which they are not shown.

That they say what the tests show is checked where the trainers' libraries are, by ``tests/integrations/scenarios.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.integrations import scenarios
from tests.integrations.scenarios import BLOCK, LIBRARIES, Outcomes, Scenario

EXAMPLE = Scenario(0, "Accelerate", "bf16", 1, "as is")
REFUSED = Scenario(1, "Accelerate", "bf16", 2, "refused: No")
OTHER = Scenario(2, "Fabric", "bf16", 2, "with `x`")


def rows(library: str, table: str) -> list[Scenario]:
    """What a library's table says."""
    found = []
    for place, line in enumerate(table.splitlines()[2:]):
        text, *cells = line.strip("| ").split(" | ")
        for ranks, cell in enumerate(cells, 1):
            if cell != "-":
                outcome = f"refused: {cell[10:-1]}" if cell.startswith('refused: "') else cell
                found.append(Scenario(place, library, text, ranks, outcome))
    return found


def test_the_table_of_all_libraries_says_what_theirs_say() -> None:
    """A table that was edited by hand differs from the other one."""
    blocks = {name: table for text in scenarios.pages().values() for _, name, table, _ in BLOCK.findall(text)}
    said = {library: rows(library, blocks[library]) for library in LIBRARIES.values()}
    assert all(said.values()), "a library has no scenario"
    made = scenarios.tables([one for library in said.values() for one in library])
    assert made == blocks


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pages that say what the three scenarios above say."""
    names = [*LIBRARIES.values(), "all"]
    page = "".join(f"<!-- scenarios of {name}: begin -->\n<!-- scenarios: end -->\n" for name in names)
    (tmp_path / "page.md").write_text(scenarios.rewritten(page, scenarios.tables([EXAMPLE, REFUSED, OTHER])))
    monkeypatch.setattr(scenarios, "DOCS", tmp_path)
    return tmp_path


def exit_status(*reports: tuple[Scenario, str]) -> int:
    """That of a run with these reports of tests."""
    session: Any = SimpleNamespace(exitstatus=0)
    plugin = Outcomes()
    for scenario, outcome in reports:
        properties = [(scenarios.PROPERTY, list(scenario))]  # a list, as from another process
        call = SimpleNamespace(user_properties=properties, when="call", passed=outcome == "passed", outcome=outcome)
        plugin.pytest_runtest_logreport(call)  # type: ignore[arg-type]
    plugin.pytest_sessionfinish(session)
    return int(session.exitstatus)


def test_a_run_passes_if_the_tables_say_what_it_showed(docs: Path) -> None:
    """Each row has a test that passed."""
    assert '| bf16 | as is | refused: "No" |' in (docs / "page.md").read_text()
    assert "| bf16 | as is (1), refused (2) | - | - | with `x` (2) | - |" in (docs / "page.md").read_text()
    assert exit_status((EXAMPLE, "passed"), (REFUSED, "passed"), (OTHER, "passed")) == 0


@pytest.mark.parametrize(
    "reports",
    [
        [(EXAMPLE, "passed"), (REFUSED, "passed")],
        [(EXAMPLE, "passed"), (REFUSED, "passed"), (OTHER, "skipped")],
        [(EXAMPLE, "passed"), (REFUSED, "passed"), (OTHER, "passed"), (OTHER, "failed")],
        [(EXAMPLE, "passed"), (REFUSED, "passed"), (OTHER._replace(outcome="as is"), "passed")],
        [(EXAMPLE, "passed"), (REFUSED, "passed"), (OTHER, "passed"), (EXAMPLE._replace(text="new"), "passed")],
    ],
    ids=["no test", "skipped", "one of two failed", "another outcome", "not in the table"],
)
@pytest.mark.usefixtures("docs")
def test_a_run_fails_if_the_tables_say_something_else(reports: list[tuple[Scenario, str]]) -> None:
    """Whether a row is missing in the table or in the run."""
    assert exit_status(*reports) == 1


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda: scenarios.tables([EXAMPLE, EXAMPLE._replace(outcome="with `x`")]), "two outcomes"),
        (lambda: scenarios.scenario_of(pytest.mark.scenario("bf16").mark, 0, "Fabric", {}), "wanted ranks="),
        (lambda: scenarios.scenario_of(pytest.mark.scenario("a", "fine", ranks=1).mark, 0, "Fabric", {}), "wanted 'as"),
    ],
)
def test_marks_that_say_nothing_are_errors(wrong: Callable[[], object], text: str) -> None:
    """They name the scenario."""
    with pytest.raises(ValueError, match=text):
        wrong()


def test_parameters_are_part_of_a_scenario() -> None:
    """Their values stand in the text, and the number of ranks is one of them."""
    mark = pytest.mark.scenario("{name}, from {before}", "with `x`").mark
    scenario = scenarios.scenario_of(mark, 3, "Fabric", {"name": "bf16", "before": 2, "ranks": 1})
    assert scenario == Scenario(3, "Fabric", "bf16, from 2", 1, "with `x`")
