"""The tables of scenarios in docs/trainers, which say what the tests of this folder have shown.

A test carries a mark for each scenario that it shows: its text, its outcome ("as is", "with ..." for an adapter, or
"refused: ..." with a part of the message) and its ranks, unless a parameter ``ranks`` has them. Braces in the text
stand for parameters of the test::

    @pytest.mark.scenario("bf16")
    @pytest.mark.scenario("stage 2 by `prepare`", "refused: do not wrap the model in DDP", ranks=2)

A test of a refusal gets the message from the fixture ``refusal``, so that the table cannot name another one.

``python -m tests.integrations.scenarios`` rewrites the tables from the marks, in an environment with the trainers'
libraries. As a plugin (``-p tests.integrations.scenarios``, for a run of the whole folder) this module lets the run
fail if a table has a row for which no test passed, or lacks one for which a test did.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs" / "trainers"
COMMAND = "python -m tests.integrations.scenarios"
# The library that the tests of a file try, in the order of the columns of the table of all.
LIBRARIES = {
    "test_accelerate": "Accelerate",
    "test_transformers": "Transformers",
    "test_lightning": "Lightning",
    "test_fabric": "Fabric",
    "test_torchtitan": "torchtitan",
}
OUTCOME = re.compile(r"as is|with .+|refused: .+")
BLOCK = re.compile(r"(<!-- scenarios of (\w+): begin -->\n)(.*?)(<!-- scenarios: end -->)", re.DOTALL)
PROPERTY = "scenario"


class Scenario(NamedTuple):
    """A cell of a table, and the place of its mark among all that were collected."""

    place: int
    library: str
    text: str
    ranks: int
    outcome: str


def scenario_of(mark: pytest.Mark, place: int, library: str, params: Mapping[str, Any]) -> Scenario:
    """The scenario of one mark on a test with these parameters; ValueError if the mark does not say one."""

    def fields(text: str, outcome: str = "as is", ranks: int | None = None) -> Scenario:
        count = params.get("ranks") if ranks is None else ranks
        if not isinstance(count, int):
            raise ValueError(f"wanted ranks=, or a parameter of that name, got none in the scenario {text!r}")
        if not OUTCOME.fullmatch(outcome):
            raise ValueError(f"wanted 'as is', 'with ...' or 'refused: ...', got {outcome!r} in {text!r}")
        return Scenario(place, library, text.format(**params), count, outcome)

    return fields(*mark.args, **mark.kwargs)


def scenarios_of(items: Iterable[pytest.Item]) -> Iterator[tuple[pytest.Item, Scenario]]:
    """What each test shows, in the order of the tests, and of the marks of one from the top."""
    place = 0
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        for mark in reversed(list(item.iter_markers("scenario"))):
            yield item, scenario_of(mark, place, LIBRARIES[item.path.stem], params)
            place += 1


def message_of(item: pytest.Item) -> str:
    """The message that the one refusal among a test's scenarios names."""
    refusals = {one.outcome for _, one in scenarios_of([item]) if one.outcome.startswith("refused: ")}
    (outcome,) = refusals
    return outcome.removeprefix("refused: ")


def tables(scenarios: Iterable[Scenario]) -> dict[str, str]:
    """Markdown by library, and under the name "all" what several of them have. ValueError if tests disagree."""
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for one in sorted(scenarios):
        row = cells.setdefault((one.library, one.text), {})
        if row.setdefault(one.ranks, one.outcome) != one.outcome:
            raise ValueError(f"two outcomes of {one}: the other one is {row[one.ranks]!r}. Give them different texts.")
    found = {library: ["| scenario | 1 rank | 2 ranks |", "|---|---|---|"] for library in LIBRARIES.values()}
    for (library, text), row in sorted(cells.items(), key=lambda cell: _group(cell[0][1])):
        found[library].append(f"| {text} | {' | '.join(_shown(row.get(ranks)) for ranks in (1, 2))} |")
    columns = list(LIBRARIES.values())
    found["all"] = [f"| scenario | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    texts = [text for _, text in sorted(cells, key=lambda key: columns.index(key[0]))]
    # Of one library alone there is nothing to compare.
    for text in sorted({text: 0 for text in texts if texts.count(text) > 1}, key=_group):
        found["all"].append(f"| {text} | {' | '.join(_in_brief(cells.get((one, text), {})) for one in columns)} |")
    return {name: "".join(f"{line}\n" for line in lines) for name, lines in found.items()}


def _group(text: str) -> int:
    """What scenarios are sorted by: plain ones, then stage 2, then FSDP2."""
    return 2 * text.startswith("FSDP2") + text.startswith("stage 2")


def _shown(outcome: str | None) -> str:
    """A cell of a library's table."""
    if outcome is None:
        return "-"
    kind, _, message = outcome.partition("refused: ")
    return f'refused: "{message}"' if message else kind


def _in_brief(row: Mapping[int, str]) -> str:
    """A cell of the table of all: for each number of ranks, whether it works."""
    brief = {ranks: outcome.partition(":")[0] for ranks, outcome in sorted(row.items())}
    if len(brief) == 2 and brief[1] == brief[2]:
        return brief[1]
    return ", ".join(f"{outcome} ({ranks})" for ranks, outcome in brief.items()) or "-"


def rewritten(page: str, by_name: Mapping[str, str]) -> str:
    """The text of a page with these tables between its comments."""
    return BLOCK.sub(lambda found: found[1] + by_name[found[2]] + found[4], page)


def pages() -> dict[Path, str]:
    """The pages with tables; RuntimeError unless each library has one, and so has the table of all."""
    found = {path: path.read_text() for path in sorted(DOCS.glob("*.md"))}
    names = sorted(name for text in found.values() for _, name, _, _ in BLOCK.findall(text))
    if names != sorted([*LIBRARIES.values(), "all"]):
        raise RuntimeError(f"wanted a pair of comments for each library and one for 'all' in {DOCS}, got {names}")
    return {path: text for path, text in found.items() if BLOCK.search(text)}


def differences(scenarios: Iterable[Scenario]) -> str:
    """A unified diff from the pages to what they would say of these scenarios; empty if they say it."""
    by_name, lines = tables(scenarios), []
    for path, text in pages().items():
        old, new = text.splitlines(), rewritten(text, by_name).splitlines()
        lines += difflib.unified_diff(old, new, f"docs/trainers/{path.name}", "what the tests showed", n=0, lineterm="")
    return "\n".join(lines)


class Outcomes:
    """The plugin in a run of the whole folder; with xdist it works in the process that hears from all workers."""

    def __init__(self) -> None:
        self._passed: set[Scenario] = set()
        self._failed: set[Scenario] = set()
        self._differences = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Sort the scenarios of a test, which ``conftest.py`` has put into its report."""
        shown = {Scenario(*value) for name, value in report.user_properties if name == PROPERTY}
        if report.when == "call" and report.passed:
            self._passed |= shown
        elif not report.passed:
            self._failed |= shown

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Compare the tables with the tests that passed."""
        self._differences = differences(self._passed - self._failed)
        if self._differences:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say which rows are wrong."""
        if self._differences:
            terminalreporter.section("scenarios")
            terminalreporter.write_line(
                f"The tables in docs/trainers do not say what the tests that passed have shown. Mend the tests, or "
                f"rewrite the tables with {COMMAND}.\n{self._differences}"
            )


def pytest_configure(config: pytest.Config) -> None:
    """Listen, unless this is a worker of xdist, whose reports go to another process."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes())


class _Collected:
    """Keeps the scenarios of all tests of the folder."""

    def __init__(self) -> None:
        self.scenarios: list[Scenario] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.scenarios = [one for _, one in scenarios_of(session.items)]


def main() -> None:
    """Rewrite the tables from the marks. All libraries have to be installed."""
    collected = _Collected()
    status = pytest.main([str(HERE), "--collect-only", "-qq"], plugins=[collected])
    missing = set(LIBRARIES.values()) - {one.library for one in collected.scenarios}
    if status != 0 or missing:
        sys.exit(
            f"wanted the tests of all trainers' libraries, got status {int(status)} and none of {sorted(missing)}. Run "
            f"this with the Python of the environment that launch/test-integrations.sh makes."
        )
    by_name = tables(collected.scenarios)
    for path, text in pages().items():
        path.write_text(rewritten(text, by_name))


if __name__ == "__main__":
    main()
