"""Damage to a checkpoint: every changed byte is noticed, nothing damaged is loaded, and the error names the file."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dist_asgd.checkpoint.format.manifest import MANIFEST_NAME, CheckpointError, check_files, read_manifest
from dist_asgd.checkpoint.format.metadata import METADATA_NAME
from dist_asgd.checkpoint.format.reader import CheckedReader, OpenCheckpoint
from tests.harness.checkpoints import blank, load, read_all, write_sample

DATA_NAME = "__0_0.distcp"
NAMES = [DATA_NAME, METADATA_NAME, MANIFEST_NAME]
NUM_FLIPS = 200


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint that no test changes."""
    return write_sample(tmp_path_factory.mktemp("written") / "checkpoint")


@pytest.fixture
def sample(written: Path, tmp_path: Path) -> Path:
    """A copy of that checkpoint, which the test may damage."""
    return Path(shutil.copytree(written, tmp_path / "checkpoint"))


def flips(size: int, num_regions: int = NUM_FLIPS) -> Iterator[tuple[int, int]]:
    """Return (offset, bit mask) pairs: an offset in each of ``num_regions`` ranges of a file, and at both ends."""
    draw = random.Random(size)
    yield from ((0, 1), (size - 1, 0x80))
    for region in range(num_regions):
        place = draw.randrange(region * size // num_regions, max((region + 1) * size // num_regions, 1))
        yield min(place, size - 1), 1 << draw.randrange(8)


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_found_wherever_it_is(sample: Path, name: str) -> None:
    """A flipped bit in data, metadata or manifest is an error that names that file."""
    good = (sample / name).read_bytes()
    for place, mask in flips(len(good)):
        data = bytearray(good)
        data[place] ^= mask
        (sample / name).write_bytes(data)
        with pytest.raises(CheckpointError) as raised:
            read_all(sample)
        assert f"{sample / name} is damaged" in str(raised.value), f"byte {place}"
    (sample / name).write_bytes(good)
    read_all(sample)


@pytest.mark.parametrize("name", [DATA_NAME, METADATA_NAME])
def test_without_hashes_damage_is_an_error_or_data_never_a_crash(sample: Path, name: str) -> None:
    """Without hashes a flipped bit in a tensor's values goes unnoticed; any other damage is a CheckpointError."""
    good = (sample / name).read_bytes()
    outcomes = set()
    # Of the metadata, every third byte.
    for place, mask in flips(len(good), NUM_FLIPS if name == DATA_NAME else len(good) // 3):
        data = bytearray(good)
        data[place] ^= mask
        (sample / name).write_bytes(data)
        try:
            read_all(sample, verify=False)
        except CheckpointError as error:
            outcomes.add(str(sample) in str(error))
    assert outcomes == {True}


@pytest.mark.parametrize(
    ("name", "verify"), [*((name, True) for name in NAMES), (DATA_NAME, False), (METADATA_NAME, False)]
)
def test_a_truncated_file_is_found_at_any_length(sample: Path, name: str, verify: bool) -> None:
    """A file that was truncated, to nothing or by one byte, is an error."""
    size = (sample / name).stat().st_size
    for length in sorted({0, 1, 2, *range(3, size, max(size // 100, 1)), size - 2, size - 1}, reverse=True):
        with (sample / name).open("r+b") as file:
            file.truncate(length)
        with pytest.raises(CheckpointError, match=name):
            read_all(sample, verify=verify)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_too_long_is_found(sample: Path, name: str) -> None:
    """A file that is one byte too long is an error."""
    with (sample / name).open("ab") as file:
        file.write(b"\n")
    with pytest.raises(CheckpointError, match=name):
        read_all(sample)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(sample: Path, name: str, verify: bool) -> None:
    """Whichever file is missing, the error names it."""
    (sample / name).unlink()
    if name == MANIFEST_NAME and not verify:
        read_all(sample, verify=False)
        return
    with pytest.raises(CheckpointError, match=f"(no |/){name}"):
        read_all(sample, verify=verify)


@pytest.mark.parametrize("name", ["__1_0.distcp", "extra.pt", ".metadata.tmp", "folder"])
def test_a_file_too_many_is_not_read(sample: Path, name: str) -> None:
    """A file that the manifest does not list is ignored, whatever it is called."""
    if name == "folder":
        (sample / name).mkdir()
    else:
        (sample / name).write_bytes(b"x")
    for verify in (True, False):
        read_all(sample, verify=verify)
        assert name not in OpenCheckpoint(sample, verify=verify).file_sizes()


@pytest.mark.parametrize("names", [[DATA_NAME], [METADATA_NAME], [MANIFEST_NAME], [DATA_NAME, METADATA_NAME]])
def test_files_of_another_step_are_found(tmp_path: Path, names: list[str]) -> None:
    """A file of another checkpoint, whole and of the same name and size, is an error."""
    sample, other = write_sample(tmp_path / "step-1"), write_sample(tmp_path / "step-2", seed=1)
    for name in names:
        shutil.copy(other / name, sample / name)
    manifest = read_manifest(sample)
    assert manifest is not None
    assert check_files(sample, manifest) == [], "sizes should be equal"
    wrong = NAMES[0] if names == [MANIFEST_NAME] else names[-1]
    with pytest.raises(CheckpointError, match=f"({wrong}|{METADATA_NAME}) is damaged"):
        read_all(sample)


def test_several_problems_are_named_together(sample: Path) -> None:
    """One error lists every file with a wrong name or size."""
    (sample / DATA_NAME).unlink()
    with (sample / METADATA_NAME).open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError) as raised:
        OpenCheckpoint(sample)
    for part in (f"{DATA_NAME} is missing", "it is too long"):
        assert part in str(raised.value)


def test_dcp_load_says_what_the_reader_said(sample: Path) -> None:
    """``dcp.load`` wraps the error, which names file and key; with DCP's own reader the damage is loaded."""
    data = bytearray((sample / DATA_NAME).read_bytes())
    reader = CheckedReader(sample)
    info = next(i for k, i in reader.read_metadata().storage_data.items() if k.fqn == "model.weight")
    at = bytes(data).index(b"archive/data/0", info.offset)
    place = next(i for i in range(at + 14, len(data)) if data[i : i + 4] == weight_bytes())
    data[place] ^= 1
    (sample / DATA_NAME).write_bytes(data)
    with pytest.raises(dcp.CheckpointException, match=r"__0_0\.distcp is damaged: model\.weight"):
        load(sample)
    silent = blank()
    dcp.load(silent, checkpoint_id=sample, no_dist=True)
    with pytest.raises(CheckpointError):
        read_all(sample)
    load(sample, verify=False)


def weight_bytes() -> bytes:
    """Return the bytes of the first element of ``model.weight`` in the sample."""
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    return weight[0, 0].numpy().tobytes()


def test_the_bytes_that_are_hashed_are_the_bytes_that_are_used(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte range is read once: a second read could return bytes that were not hashed."""
    from dist_asgd.checkpoint.format import reader

    ranges = []
    read_range = reader.read_range

    def watched(file: object, path: Path, offset: int, length: int) -> bytes:
        ranges.append((path.name, offset, length))
        return read_range(file, path, offset, length)  # type: ignore[arg-type]

    monkeypatch.setattr(reader, "read_range", watched)
    load(sample)
    empty = 1
    assert len(ranges) == len(set(ranges)) == len(OpenCheckpoint(sample).metadata.storage_data) - empty


def test_pieces_of_one_chunk_are_read_once(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk is read once, also if a load on another topology wants several regions of it."""
    from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

    from dist_asgd.checkpoint.format import reader

    checked = CheckedReader(sample)
    index = next(i for i in checked.read_metadata().storage_data if i.fqn == "model.weight")
    target = torch.zeros(3, 5)

    class Rows:
        def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
            return target[item.dest_offsets[0] : item.dest_offsets[0] + 1]

        def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
            pass

    items = [
        ReadItem(LoadItemType.TENSOR, index, torch.Size([row, 0]), index, torch.Size([row, 0]), torch.Size([1, 5]))
        for row in range(3)
    ]
    counted = []
    load_tensor = reader.load_tensor
    monkeypatch.setattr(reader, "load_tensor", lambda *args: counted.append(1) or load_tensor(*args))
    checked.read_data(LoadPlan(items), Rows())  # type: ignore[arg-type]
    assert torch.equal(target, torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))
    assert len(counted) == 1
