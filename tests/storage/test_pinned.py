"""Page-locked memory for staging: of the size of the state, and unlocked before it is freed. CUDA is imitated."""

from __future__ import annotations

import gc
import logging
import mmap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_asgd.checkpoint import staging
from dist_asgd.checkpoint.staging import StagingArea
from dist_asgd.storage.pinned import PinnedMemory
from tests.harness.bits import assert_same_bits


class Runtime:
    """The two calls of CUDA's runtime; ``locked`` has the bytes that are locked, by address."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.error = 0

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        assert not address % mmap.PAGESIZE
        if not self.error:
            self.locked[address] = num_bytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """CUDA's runtime, which is asked to lock the copies of all tensors."""
    made = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(staging, "_is_on_gpu", lambda _: True)
    yield made
    gc.collect()


def state() -> dict[str, dict[str, Any]]:
    """Tensors of odd sizes, one beside another in a storage, a transposed one, an empty one, and a scalar."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(2049, generator=generator)
    tensors: dict[str, Any] = {
        "alone": torch.randn(33, 129, generator=generator),
        "large": torch.randn((1 << 18) + 1, generator=generator),
        "transposed": torch.randn(7, 5, generator=generator).t(),
        "half": torch.randn(101, generator=generator).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "first": flat[:1000],
        "second": flat[1001:],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.0),
    }
    return {"model": tensors}


def check_copy(area: StagingArea, original: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """The copies, which have the values of the original and memory of their own."""
    copied = area.copy(original)["model"]
    for key, tensor in original["model"].items():
        if tensor.dtype == torch.bool:
            assert torch.equal(copied[key], tensor)
        else:
            assert_same_bits(copied[key], tensor, key)
        assert not tensor.numel() or copied[key].data_ptr() != tensor.data_ptr()
    return copied


def test_no_more_is_locked_than_is_copied(runtime: Runtime) -> None:
    """torch's allocator would lock twice as much for a tensor of one element more than a power of two."""
    original, area = state(), StagingArea()
    copied = check_copy(area, original)
    asked = sum(tensor.nbytes for tensor in original["model"].values())
    assert asked <= sum(runtime.locked.values()) <= asked + 64 * len(original["model"]) + mmap.PAGESIZE
    # A second copy takes no more memory, and a changed tensor new memory for itself and for no other.
    locked = dict(runtime.locked)
    again = check_copy(area, original)
    assert runtime.locked == locked
    assert again["large"].data_ptr() == copied["large"].data_ptr()
    original["model"]["alone"] = torch.ones(3, 4)
    changed = check_copy(area, original)
    assert len(runtime.locked) == 2
    assert changed["large"].data_ptr() == copied["large"].data_ptr()


def test_memory_is_unlocked_before_it_is_freed(runtime: Runtime) -> None:
    """With the staging area; a copy that is kept longer keeps its memory, unlocked."""
    area = StagingArea()
    copied = check_copy(area, state())
    kept = copied["large"]
    del area, copied
    gc.collect()
    assert runtime.locked == {}
    assert_same_bits(kept, state()["model"]["large"], "a copy that was kept")


def test_memory_that_cannot_be_locked_is_used_all_the_same(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    """The copy is right, and the log says that it is slower, and the remedy."""
    runtime.error = 2
    with caplog.at_level(logging.WARNING):
        check_copy(StagingArea(), state())
    assert "could not be page-locked (CUDA error 2)" in caplog.text
    assert "ulimit -l" in caplog.text


def test_nothing_is_locked_for_nothing(runtime: Runtime) -> None:
    """Sizes of zero make no mapping."""
    memory = PinnedMemory([0, 0])
    assert [tensor.numel() for tensor in memory.tensors] == [0, 0]
    assert (memory.nbytes, runtime.locked) == (0, {})
