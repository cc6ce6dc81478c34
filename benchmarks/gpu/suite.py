"""The tests with the marker ``gpu``, as far as this machine has what they need."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.rows import FAIL, NOTE, PASS, Part, one_line

REPOSITORY = Path(__file__).parents[2]
# ``test_cuda_kernels`` compiles some hundred kernels, so it comes last.
FILES = ("tests/test_gpu.py", "tests/update/test_cuda_kernels.py")
TIMEOUT_S = 150


def run(part: Part) -> None:
    """Run each file by itself; on CPUs only look whether its tests can be found."""
    if part.cpu:
        for file in FILES:
            part.check(f"{file} is there", (REPOSITORY / file).exists())
        return
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        part.add("gpu tests", NOTE, f"not run: {' and '.join(missing)} not installed; the other parts need neither")
        return
    for file in FILES:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--no-header", file]
        command += ["-rfE", "--tb=line"]
        try:
            done = subprocess.run(
                command, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            output = error.stdout or b""
            text = output.decode() if isinstance(output, bytes) else output
            part.add(file, FAIL, f"stopped after {TIMEOUT_S} s: {one_line(text[-300:])}")
            continue
        lines = done.stdout.strip().splitlines()
        summary = lines[-1].strip("= ") if lines else one_line(done.stderr[-300:])
        part.add(file, PASS if done.returncode == 0 else FAIL, summary)
        for line in lines:
            if re.match(r"(FAILED|ERROR) ", line):
                part.add(file, FAIL, one_line(line))
