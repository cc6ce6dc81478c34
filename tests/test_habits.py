"""Files that people and tools read beside the code: what they say about the repository is true."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dist_asgd

REPOSITORY = Path(__file__).parent.parent


def lines_after(prefix: str, *path: str) -> list[str]:
    """The rest of each line of a file that starts with ``prefix``, indented or not, in order."""
    lines = REPOSITORY.joinpath(*path).read_text().splitlines()
    return [line.strip().removeprefix(prefix) for line in lines if line.strip().startswith(prefix)]


def test_the_hooks_run_what_ci_runs() -> None:
    """Each command of launch/test.sh but the tests themselves, in the same order."""
    commands = lines_after(".venv/bin/python -m ", "launch", "test.sh")
    checks = [command for command in commands if not command.startswith("pytest")]
    assert checks
    assert lines_after("entry: .venv/bin/python -m ", ".pre-commit-config.yaml") == checks


def test_every_extra_is_pinned() -> None:
    """A tool without a pin would have another version in each fresh environment."""
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {canonicalize_name(Requirement(text).name) for extra in extras.values() for text in extra}
    pinned = set()
    for file in ("requirements.txt", "requirements-dev.txt", "requirements-integrations.txt", "requirements-bench.txt"):
        for line in (REPOSITORY / "launch" / file).read_text().splitlines():
            if not line.startswith("#"):
                pinned.add(canonicalize_name(Requirement(line).name))
    assert wanted - {canonicalize_name("dist_asgd")} <= pinned


def test_the_citation_has_the_version_of_the_package() -> None:
    """Whoever cites the software cites the version that the package says it is."""
    assert lines_after("version: ", "CITATION.cff") == [dist_asgd.__version__]


def test_contributing_names_files_that_exist() -> None:
    """A newcomer is not sent to a file that has moved."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    named = re.findall(r"(?<![\w/])(?:dist_asgd|tests|launch|benchmarks|docs)/[\w./-]*", text)
    assert named
    assert [path for path in named if not (REPOSITORY / path.rstrip(".")).exists()] == []
