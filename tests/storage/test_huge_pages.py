"""Large flat memory on CPUs begins at a huge page and asks for them; without them it is ordinary memory."""

import ctypes
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dist_asgd import ShardedASGD
from dist_asgd.storage import huge_pages

CPU = torch.device("cpu")
LARGE = 3 * huge_pages.MIN_BYTES // 4 + 5

needs_pages = pytest.mark.skipif(not huge_pages.page_bytes(), reason="this system hands out no huge pages")


def flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping that has ``address``; "hg" says that huge pages were asked for."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif here and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@needs_pages
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_memory_asks_for_huge_pages(dtype: torch.dtype) -> None:
    """The elements begin at one, and only whole ones inside of the memory are asked for."""
    size = huge_pages.page_bytes()
    for made in (huge_pages.zeros(LARGE, dtype, CPU), huge_pages.empty(LARGE, dtype, CPU)):
        assert (made.shape, made.dtype, made.is_contiguous()) == ((LARGE,), dtype, True)
        assert made.data_ptr() % size == 0
        assert "hg" in flags_at(made.data_ptr())
        assert "hg" not in flags_at(made.data_ptr() + made.nbytes // size * size)
    assert not huge_pages.zeros(LARGE, dtype, CPU).any()


def plain(made: Tensor) -> bool:
    """Whether the storage has the tensor's bytes and no more."""
    return made.untyped_storage().nbytes() == made.nbytes


def test_little_memory_is_left_alone() -> None:
    """An optimizer of a small model has not a byte more for it."""
    optimizer = ShardedASGD([nn.Parameter(torch.zeros(1000))])
    for bucket in optimizer.shards.buckets:
        assert plain(bucket.flat)
        assert plain(bucket.average)


def test_a_system_without_huge_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It may have none, or have turned them off: the memory is as torch makes it."""
    monkeypatch.setattr(huge_pages, "_FOLDER", tmp_path)
    find = huge_pages.page_bytes.__wrapped__
    assert find() == 0
    (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert find() == 0
    monkeypatch.setattr(huge_pages, "page_bytes", find)
    assert plain(huge_pages.zeros(LARGE, torch.float32, CPU))
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert find() == 2097152


def test_a_system_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory has small pages then."""

    class Refusing:
        calls = 0

        def madvise(self, start: int, num_bytes: int, advice: int) -> int:
            self.calls += 1
            return -1

    library = Refusing()
    monkeypatch.setattr(huge_pages, "page_bytes", lambda: 1 << 21)
    monkeypatch.setattr(huge_pages, "_libc", lambda: library)
    made = huge_pages.zeros(LARGE, torch.float32, CPU)
    assert library.calls == 1
    assert made.sum().item() == 0
    assert ctypes.string_at(made.data_ptr() + made.nbytes - 4, 4) == bytes(4)
