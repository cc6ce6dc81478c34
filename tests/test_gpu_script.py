"""``benchmarks/gpu.sh``: a report comes out whatever fails. CI tries the parts themselves out with ``--cpu``."""

import pytest
import torch

from benchmarks.gpu import __main__ as script
from benchmarks.gpu.rows import FAIL, NOTE, PASS, Row

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def test_a_part_that_fails_hides_no_other() -> None:
    """Each of its checks is a row."""
    rows = script.in_a_process("graphs", 60.0)
    assert len(rows) == 3
    assert {row.result for row in rows} == {FAIL}
    report = script.as_markdown({"device": "none"}, [*rows, Row("nccl", "a | check", PASS)])
    assert "1 rows are PASS, 3 are FAIL" in report
    assert "| graphs: captured step" in report
    assert "a \\| check" in report


def test_a_part_without_time_is_not_begun() -> None:
    """The budget is for all parts together."""
    assert [row.result for row in script.in_a_process("graphs", 1.0)] == [NOTE]


def test_without_a_gpu_there_is_no_report(capsys: pytest.CaptureFixture[str]) -> None:
    """An old report stays."""
    assert script.main(["--parts", "graphs"]) == 2
    assert "--cpu" in capsys.readouterr().err
