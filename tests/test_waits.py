"""Where the host would wait for a GPU: hardly anywhere. Watched on a device that is pretended on the CPU.

``harness/pretended_device.py`` says what it sees and what it cannot see.
"""

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.harness.pretended_device import cases

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
CHECKSUMS = "gradients/checksums.py copy to the host"


@cache
def outcomes() -> dict[str, dict[str, list[str]]]:
    """What each call waits for, by case and call; places without line numbers."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.harness.pretended_device"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=True)
    found = {name: json.loads(found) for name, found in (line.split("\t") for line in done.stdout.splitlines())}
    return {name: {call: list(map(without_line, places)) for call, places in of.items()} for name, of in found.items()}


def without_line(place: str) -> str:
    """``file:line operator`` as ``file operator``; other texts as they are."""
    file, _, rest = place.partition(":")
    return f"{file} {rest.partition(' ')[2]}" if file.endswith(".py") else place


def expected(case: str) -> dict[str, list[str]]:
    """The calls of a case that do wait, and for what."""
    kind, *_, form = case.split(", ")
    if kind == "ranks":
        # Starting values are compared once, and in stage 1 the first gradients: one number for all that lie together.
        return {"first step": [CHECKSUMS] * (2 if "stage 1" in case else 1)}
    if kind == "scaler":
        # Two steps. In stage 1 torch's own scaler asks whether it skips; only a kernel can skip by itself.
        skips = "amp.py _local_scalar_dense" if "stage 1" in case else "gradients/loss_scaling.py copy to the host"
        return {} if form == "fused" and "stage 2" in case else {"scaler.step": [skips] * 2}
    if kind == "average" and form == "fused":
        # Whether averaging has begun the device knows; one cohort, so one number. Those of a pretended device say that
        # it has not, so that the warning reads the step, once.
        waits = ["update/schedule.py _local_scalar_dense", "averaging_start.py _local_scalar_dense"]
        return {"averaged_parameters": waits}
    return {}


@pytest.mark.parametrize("case", cases())
def test_the_host_waits_for_nothing_else(case: str) -> None:
    """Backward, clip, step and zero_grad, also when other parameters have gradients than in the step before."""
    found = outcomes()[case]
    assert {call: places for call, places in found.items() if places} == expected(case)
