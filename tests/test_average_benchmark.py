"""``benchmarks.average``: the slopes keep their bounds, which can be broken, and pages have the report's tables."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import average
from benchmarks.average_experiments import Size, quadratic_curves


def test_slopes_on_the_quadratic_keep_their_bounds() -> None:
    """The averaged error falls like 1 / n, and that of the last iterate does not; each law refutes the other."""
    last, averaged, cosine = quadratic_curves(Size(replicates=64, quadratic_steps=512))
    assert average.out_of_bounds({"curves": [curve.as_dict() for curve in (last, averaged, cosine)]}) == []
    assert averaged.expected_slope == pytest.approx(averaged.law, abs=0.05)
    assert cosine.expected_slope == pytest.approx(cosine.law, abs=0.05)
    for curve, other in ((last, averaged), (averaged, last), (averaged, cosine), (cosine, averaged)):
        wrong = replace(curve, expected=other.expected).as_dict()
        (text,) = average.out_of_bounds({"curves": [wrong]})
        assert text.startswith(f"quadratic, {curve.name}: the slope is {curve.slope:.3f}")


@pytest.mark.parametrize("page", average.PAGES, ids=lambda page: page.name)
def test_pages_have_the_tables_of_the_report(page: Path) -> None:
    """``python -m benchmarks.average --publish`` writes them."""
    report = json.loads((average.RESULTS / "average.json").read_text())
    text = page.read_text()
    assert "<!-- benchmarks.average: " in text
    assert average.with_copies(text, report) == text


def test_the_report_is_that_of_its_figures() -> None:
    """``python -m benchmarks.average --again`` writes it."""
    report = json.loads((average.RESULTS / "average.json").read_text())
    assert average.as_markdown(report) == (average.RESULTS / "average.md").read_text()
    assert average.out_of_bounds(report) == []
