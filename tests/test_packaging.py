"""The source distribution holds the repository, and the wheel builds from it with and without a C compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def build(kind: str, source: Path, out: Path, **environment: str) -> Path:
    """Build ``kind`` ("build_sdist" or "build_wheel") of ``source`` in a process of its own; returns the file."""
    command = [sys.executable, "-c", BUILD, kind, str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, env={**os.environ, **environment})
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of a clone, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("not a git repository")
    clone = folder / "clone"
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(REPOSITORY), str(clone)], check=True)
    (folder / "out").mkdir()
    with tarfile.open(build("build_sdist", clone, folder / "out")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    tracked = subprocess.run(["git", "ls-files"], cwd=clone, check=True, capture_output=True, text=True).stdout
    # Archives of setuptools have no links; the one in the repository's fixtures leads beside itself.
    files = [name for name in tracked.splitlines() if not (clone / name).is_symlink()]
    missing = [name for name in files if not (unpacked / name).exists()]
    assert not missing
    return unpacked


@pytest.mark.parametrize("compiler", [True, False])
def test_wheels_build_from_the_source_distribution(compiler: bool, sdist: Path, tmp_path: Path) -> None:
    """With a compiler it has the kernel; without one it has everything else, and can be imported."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(sdist, source)
    out.mkdir()
    # The kernel's own flags are not of interest here, and -O0 compiles in a second.
    environment = {"CFLAGS": "-O0"} if compiler else {"CC": "/nonexistent"}
    with zipfile.ZipFile(build("build_wheel", source, out, **environment)) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path / "installed")
    for library in ("update/_kernel.", "storage/_snapshots.c", "comm/_pages."):
        assert any(library in name for name in names) == compiler
    assert "dist_asgd/checkpoint/format/stores.py" in names
    assert not any(name.startswith(("tests/", "launch/", "benchmarks/")) for name in names)
    code = "import dist_asgd, sys; sys.exit(not dist_asgd.__file__.startswith(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / "installed")]
    subprocess.run(command, cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")})
