"""What tests of trainers have in common: scenarios, of which ``scenarios.py`` makes the tables in docs/trainers."""

import pytest

from tests.integrations.scenarios import PROPERTY, message_of, scenarios_of


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the scenarios of each test into its report. A test of a refusal has to look for the message that it names."""
    for item, scenario in scenarios_of(items):
        item.user_properties.append((PROPERTY, tuple(scenario)))
        if scenario.outcome.startswith("refused: ") and "refusal" not in getattr(item, "fixturenames", ()):
            raise pytest.UsageError(f"{item.nodeid}: wanted the fixture 'refusal', which gives it the message")


@pytest.fixture
def refusal(request: pytest.FixtureRequest) -> str:
    """A part of the error that this test has to see: the message that its scenario names."""
    return message_of(request.node)
