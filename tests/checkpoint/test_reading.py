"""Archives in a known frame are not unpickled again, and give the same tensors."""

import io
import sys
import zipfile

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.utils.serialization import config

from dist_asgd.checkpoint.format.archives import FrameCache, load_tensor
from tests.harness.bits import assert_same_bits


def archive_of(tensor: Tensor, byteorder: str = sys.byteorder) -> bytes:
    """Return the archive that this package writes, without checksums, with ``byteorder`` as its byte order."""
    stream = io.BytesIO()
    with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
        torch.save(tensor, stream)
    if byteorder == sys.byteorder:
        return stream.getvalue()
    said = io.BytesIO()
    with zipfile.ZipFile(stream) as source, zipfile.ZipFile(said, "w", zipfile.ZIP_STORED) as target:
        for record in source.infolist():
            start = record.header_offset + 26
            lengths = [int.from_bytes(stream.getvalue()[at : at + 2], "little") for at in (start, start + 2)]
            first = start + 4 + sum(lengths)
            content = stream.getvalue()[first : first + record.file_size]
            target.writestr(record.filename, byteorder if record.filename.endswith("byteorder") else content)
        checksums = [record.CRC.to_bytes(4, "little") for record in target.infolist() if "/data/" in record.filename]
    return said.getvalue().replace(checksums[0], bytes(4))


def loaded(data: bytes, like: Tensor, frames: FrameCache) -> Tensor:
    """Load ``data`` as the reader does."""
    return load_tensor(data, like.shape, TensorProperties(dtype=like.dtype), "a chunk", frames)


def drawn(kind: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Return a tensor whose memory layout is ``kind``."""
    whole = torch.randn(6, 10, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))
    whole = whole if dtype.is_complex else whole.real
    whole = whole.to(dtype)
    views = {
        "contiguous": whole[:, :5].clone(),
        "transposed": whole[:, :5].t().clone(memory_format=torch.preserve_format),
        "a view of more": whole[:, 2:7],
        "conjugated": whole[:, :5].clone().conj(),
        "empty": whole[:0],
        "one number": whole[0, 0].clone(),
    }
    return views[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize(
    ("kind", "known"),
    [
        ("contiguous", True),
        ("transposed", True),
        ("one number", True),
        ("a view of more", False),
        ("conjugated", None),
        ("empty", False),
    ],
)
def test_like_archives_come_to_the_same(kind: str, known: bool | None, dtype: torch.dtype) -> None:
    """Tensors of several shapes come back to the bit; those that are not dense are unpickled each time."""
    frames = FrameCache()
    for seed in range(3):
        for tensor in (drawn(kind, dtype, seed), drawn(kind, dtype, seed).unsqueeze(0)):
            data = archive_of(tensor)
            expected = torch.load(io.BytesIO(data), weights_only=True)
            is_known = frames.tensor_in(data, dtype, tensor.shape) is not None
            assert is_known == ((known if known is not None else not dtype.is_complex) and seed > 0)
            found = loaded(data, tensor, frames)
            assert_same_bits(found.resolve_conj(), expected.resolve_conj(), f"{kind} {dtype}")
            assert found.stride() == expected.stride()


def test_the_other_byte_order_is_turned_around_each_time() -> None:
    """An archive of the other byte order does not become a known frame, although its zeros read the same both ways."""
    other = "big" if sys.byteorder == "little" else "little"
    frames = FrameCache()
    for tensor in (torch.zeros(4), torch.arange(4.0)):
        data = archive_of(tensor, other)
        assert_same_bits(loaded(data, tensor, frames), torch.load(io.BytesIO(data), weights_only=True), "turned around")


def test_elements_that_are_there_twice_are_not_known() -> None:
    """An archive with two records of one name does not become a known frame."""
    frames, tensor = FrameCache(), torch.arange(6.0)
    stream = io.BytesIO(archive_of(tensor))
    with zipfile.ZipFile(stream, "a", zipfile.ZIP_STORED) as archive:
        name = next(name for name in archive.namelist() if "/data/" in name)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(name, (-tensor).numpy().tobytes())
    loaded(stream.getvalue(), tensor, frames)
    assert frames.tensor_in(stream.getvalue(), tensor.dtype, tensor.shape) is None


def test_an_archive_that_differs_around_its_elements_is_unpickled() -> None:
    """An archive that differs from a known frame in one bit is unpickled and checked."""
    frames, tensor = FrameCache(), torch.arange(6.0)
    good = archive_of(tensor)
    loaded(good, tensor, frames)
    assert frames.tensor_in(good, tensor.dtype, tensor.shape) is not None
    start = good.index(tensor.numpy().tobytes())
    for at in (*range(start), *range(start + tensor.nbytes, len(good))):
        data = bytearray(good)
        data[at] ^= 1
        assert frames.tensor_in(bytes(data), tensor.dtype, tensor.shape) is None
