"""The index of a checkpoint says what ``.metadata`` says, and whatever else it may hold is an error, and no crash."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata

from dist_asgd import ShardedASGD, load_checkpoint, save_checkpoint
from dist_asgd.checkpoint.format import index, metadata
from dist_asgd.checkpoint.format.chunk_table import ChunkTable
from dist_asgd.checkpoint.format.index import INDEX_NAME
from dist_asgd.checkpoint.format.manifest import CheckpointError, Chunk, FileEntry, hash_of
from dist_asgd.checkpoint.format.metadata_writer import metadata_bytes
from dist_asgd.checkpoint.format.reader import OpenCheckpoint
from dist_asgd.checkpoint.format.table_extents import check_table
from dist_asgd.checkpoint.offline.verify import verify
from tests.harness.bits import assert_same_bits
from tests.harness.checkpoints import read_all, read_metadata, resign, write_index, write_table
from tests.harness.ranks import run, run_errors

SHAPES: dict[str, tuple[int, ...]] = {"a": (9, 7), "b": (11,), "c": (2, 5, 3), "d": (), "e": (0, 4), "f": (1, 300)}


def model_of(seed: int) -> nn.Module:
    """Parameters of all numbers of dimensions, which four ranks cut inside their rows."""
    draw = torch.Generator().manual_seed(seed)
    return nn.ParameterDict({name: nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in SHAPES.items()})


def trained(seed: int = 0) -> tuple[nn.Module, ShardedASGD]:
    """A model after a step, in several buckets."""
    model = model_of(seed)
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=0, bucket_cap_mb=2e-4)
    for param in model.parameters():
        param.grad = torch.full_like(param, 0.5)
    optimizer.step()
    return model, optimizer


def save(_rank: int, _world_size: int, path: str, seed: int = 0) -> None:
    """Job: save ``trained``."""
    save_checkpoint(path, *trained(seed), step=1, extra={"seed": seed})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four ranks, which no test changes."""
    path = tmp_path_factory.mktemp("index") / "saved"
    run("gloo", 4, save, str(path))
    return path


@pytest.fixture
def sample(written: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(written, tmp_path / "saved"))


def tensors_of(path: Path, **options: Any) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole."""
    opened = OpenCheckpoint(path, **options)
    entries = opened.metadata.state_dict_metadata.items()
    return {key: opened.whole_tensor(key) for key, entry in entries if isinstance(entry, TensorStorageMetadata)}


# --- it says what .metadata says -------------------------------------------------------------------------


def test_whoever_reads_only_one_finds_the_same(written: Path) -> None:
    """The index, ``.metadata`` by this package's own parser, and by ``pickle`` and DCP's own reader."""
    indexed, described = OpenCheckpoint(written), OpenCheckpoint(written, verify=False)
    unpickled = read_metadata(written)
    assert described.metadata == unpickled
    assert list(indexed.metadata.state_dict_metadata) == list(unpickled.state_dict_metadata)
    for key, entry in unpickled.state_dict_metadata.items():
        found = indexed.metadata.state_dict_metadata[key]
        assert type(found) is type(entry)
        if isinstance(entry, TensorStorageMetadata):
            assert (found.size, found.properties, list(found.chunks)) == (entry.size, entry.properties, entry.chunks)
    assert indexed.metadata.storage_data == unpickled.storage_data
    assert indexed.metadata.planner_data == unpickled.planner_data
    assert (indexed.metadata.storage_meta, indexed.metadata.version) == (unpickled.storage_meta, unpickled.version)
    model, _ = trained()
    blank = {"model": {name: torch.zeros_like(param) for name, param in model.named_parameters()}}
    dcp.load(blank, checkpoint_id=written, no_dist=True)
    for name, param in model.named_parameters():
        for found in (blank["model"][name], tensors_of(written)[f"model.{name}"]):
            assert_same_bits(found, param.detach(), name)
    assert verify(written).problems == []


def test_a_table_goes_through_its_bytes(written: Path) -> None:
    """Nothing is lost, and equal tables have equal bytes."""
    table = OpenCheckpoint(written).table()
    data = index.encode(table)
    assert data == (written / INDEX_NAME).read_bytes()
    again = index.decode(data, "here", os.listdir(written), table.saved_by)
    assert index.encode(again) == data
    assert metadata_bytes(again) == (written / ".metadata").read_bytes()
    assert (again.kinds, again.planner_data, again.saved_by) == (table.kinds, table.planner_data, table.saved_by)
    # Parameters and averages that are cut alike have one cut.
    assert len(again.cuts) < sum(kind is not None for kind in again.kinds.values())


def large(offset: int) -> ChunkTable:
    """A table of 700 regions, from ``offset`` on in a file, and of a key with a path of its own."""
    count = 700
    rows = np.arange(count, dtype=np.int64)
    cut = np.stack([np.stack([rows, 0 * rows], 1), np.stack([0 * rows + 1, 0 * rows + 3], 1)], 1)
    ranges = np.stack([0 * rows, offset + 12 * rows, 0 * rows + 12], 1)
    return ChunkTable(
        {"w" * 300: (TensorProperties(torch.float32), torch.Size([count, 3])), "v": None},
        [cut],
        np.array([0, -1]),
        np.concatenate([ranges, [[1, 0, 1 << 20]]]),
        np.arange(16 * (count + 1), dtype=np.uint32).astype(np.uint8).reshape(-1, 16),
        [metadata._StorageInfo("a", 0, 0), metadata._StorageInfo("b", 0, 0)],
        {"w" * 300: ("model", "w"), "v": ("extra", 3, "é", -1, 1 << 40)},
        metadata.StorageMeta("here", "id"),
        "1.0.0",
        None,
    )


@pytest.mark.parametrize("offset", [0, 200, 60_000, (1 << 31) - 4000, 1 << 40])
def test_numbers_of_all_lengths(offset: int) -> None:
    """Offsets take one, two, four or eight bytes, and beyond 256 names of files, keys and regions five."""
    table = large(offset)
    data = metadata_bytes(table)
    unpickled = pickle.loads(data)
    assert metadata.parse(data, "here") == unpickled
    key = "w" * 300
    assert unpickled.planner_data == table.planner_data
    places = {i.offset[0]: info for i, info in unpickled.storage_data.items() if i.fqn == key}
    assert [(places[row].offset, places[row].length) for row in range(700)] == [
        (offset + 12 * row, 12) for row in range(700)
    ]
    again = index.decode(index.encode(table), "here", ["a", "b"], None)
    assert again.planner_data == table.planner_data
    assert (again.ranges == table.ranges).all()
    assert again.kinds == table.kinds
    check_table(again, {"a": 1 << 41, "b": 1 << 20}, "here")


# --- damage ----------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_wherever_it_is(sample: Path) -> None:
    """By the manifest's hash."""
    good = (sample / INDEX_NAME).read_bytes()
    draw = random.Random(0)
    for place in (0, len(good) - 1, *(draw.randrange(len(good)) for _ in range(60))):
        data = bytearray(good)
        data[place] ^= 1 << draw.randrange(8)
        (sample / INDEX_NAME).write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{sample / INDEX_NAME} is damaged"):
            OpenCheckpoint(sample)
        assert any(f"{sample / INDEX_NAME} is damaged" in line for line in verify(sample).problems)


@pytest.mark.parametrize("what", ["missing", "short", "long", "link", "a terabyte", "unlisted"])
def test_a_file_that_is_not_whole_is_named(sample: Path, tmp_path: Path, what: str) -> None:
    """The error says which file, and how."""
    file, size = sample / INDEX_NAME, (sample / INDEX_NAME).stat().st_size
    if what == "missing":
        file.unlink()
    elif what == "link":
        file.rename(tmp_path / "outside")
        file.symlink_to(tmp_path / "outside")
    elif what == "unlisted":
        file.rename(tmp_path / "outside")
        resigned(sample, without=INDEX_NAME)
    else:
        with file.open("r+b") as opened:
            opened.truncate({"short": size - 1, "long": size + 1, "a terabyte": 1 << 40}[what])
    message = {"missing": "is missing", "short": "truncated", "long": "too long", "link": "symbolic link"}
    with pytest.raises(CheckpointError, match=f"{INDEX_NAME}.*{message.get(what, '')}"):
        OpenCheckpoint(sample)
    # Of a terabyte too, which it does not read.
    assert any(INDEX_NAME in problem for problem in verify(sample).problems)
    # The tensors are still there for whoever wants no hashes.
    assert tensors_of(sample, verify=False)


def resigned(directory: Path, without: str) -> None:
    """Sign a checkpoint anew, and leave a file out."""
    from dist_asgd.checkpoint.format.manifest import read_manifest, write_manifest

    old = read_manifest(directory)
    assert old is not None
    write_manifest(directory, replace(old, files={n: e for n, e in old.files.items() if n != without}))


def jobs_fail(_rank: int, _world_size: int, path: str) -> None:
    """Job: load."""
    load_checkpoint(path, *trained(1))


def test_all_ranks_say_what_rank_0_has_found(sample: Path) -> None:
    """A damaged index is the same error on all ranks, which have changed nothing."""
    with (sample / INDEX_NAME).open("r+b") as file:
        file.seek(200)
        file.write(b"\0\0\0")
    for error in run_errors("gloo", 2, jobs_fail, str(sample)):
        assert error.type_name == "CheckpointError"
        assert f"{INDEX_NAME} is damaged" in error.message


# --- forged ----------------------------------------------------------------------------------------------


def test_a_forged_index_is_an_error_or_the_truth(sample: Path) -> None:
    """Signed as an attacker would: a flipped bit anywhere never makes a wrong tensor, and never another error."""
    good = (sample / INDEX_NAME).read_bytes()
    wanted = tensors_of(sample)
    draw = random.Random(1)
    outcomes = {"refused": 0, "read": 0}
    for place in [*range(0, 30, 3), *(draw.randrange(len(good)) for _ in range(60))]:
        data = bytearray(good)
        data[place] ^= 1 << draw.randrange(8)
        write_index(sample, bytes(data))
        refusal, found = "", dict[str, Tensor]()
        try:
            read_all(sample)
            found = tensors_of(sample)
        except CheckpointError as error:
            refusal = str(error)
        if refusal:
            assert str(sample) in refusal
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        for key in found.keys() & wanted.keys():
            if found[key].shape == wanted[key].shape:
                assert_same_bits(found[key], wanted[key], f"{key} with byte {place}")
        assert verify(sample).problems, f"byte {place}"
    assert min(outcomes.values()) > 0, outcomes


def test_an_index_that_is_cut_short_is_refused_at_any_length(sample: Path) -> None:
    """Signed too."""
    good = (sample / INDEX_NAME).read_bytes()
    for length in sorted({0, 1, 16, 17, 24, 25, 26, *range(30, len(good), len(good) // 40), len(good) - 1}):
        write_index(sample, good[:length])
        with pytest.raises(CheckpointError, match=f"{INDEX_NAME} is damaged, or was not written by dist_asgd"):
            OpenCheckpoint(sample)
    write_index(sample, good + b"\0")
    with pytest.raises(CheckpointError, match="its columns have"):
        OpenCheckpoint(sample)


Header = dict[str, Any]


def put(name: str, value: Any) -> Callable[[Header], None]:
    """Replace an entry of the header."""
    return lambda header: header.update({name: value})


def put_in(name: str, position: int, value: Any) -> Callable[[Header], None]:
    """Replace an item of a list in the header."""
    return lambda header: header[name].__setitem__(position, value)


HEADERS: dict[str, tuple[Callable[[Header], None], str]] = {
    "a key too many": (put("more", 1), "has not the keys"),
    "no list": (put("keys", {}), "'keys' must be a list"),
    "a path out": (put_in("files", 0, "../secret"), "secret"),
    "an absolute path": (put_in("files", 0, "/etc/passwd"), "/etc/passwd"),
    "a file that is not signed": (put_in("files", 0, "other"), "not among the files of the manifest"),
    "a file twice": (lambda header: header["files"].__setitem__(0, header["files"][1]), "a file is listed twice"),
    "a file less": (lambda header: header["files"].pop(), "a file that it does not list"),
    "a huge cut": (put_in("cuts", 0, [1 << 61, 2]), "its header says|other dimensions"),
    "a cut of many dimensions": (put_in("cuts", 0, [1, 65]), "the numbers of its regions"),
    "a negative cut": (put_in("cuts", 0, [-1, 2]), "the numbers of its regions"),
    "a cut of text": (put_in("cuts", 0, "x"), "the numbers of its regions"),
    "a key twice": (lambda header: header["keys"].__setitem__(0, header["keys"][1]), "a key occurs twice|header says"),
    "a key that is none": (put_in("keys", 0, 3), "a key must be a string"),
    "a key of bytes": (put_in("keys", 0, [3, "float32", [1], 0]), "a key that is no string"),
    "no dtype": (put_in("keys", 0, ["x", "object", [9, 7], 0]), "the dtype of x"),
    "a dtype in a list": (put_in("keys", 0, ["x", ["float32"], [9, 7], 0]), "the dtype of x"),
    "a negative shape": (put_in("keys", 0, ["x", "float32", [-9, 7], 0]), "the shape of x"),
    "a shape of true": (put_in("keys", 0, ["x", "float32", [True, 7], 0]), "the shape of x"),
    "a cut that is not there": (put_in("keys", 0, ["x", "float32", [9, 7], 1000]), "a cut that is not there"),
    "a huge shape": (put_in("keys", 0, ["x", "float32", [1 << 31, 1 << 31], 0]), "needs"),
    "a huge shape of nothing": (put_in("keys", 0, ["x", "float32", [1 << 61, 0], 0]), "not inside|hold 63"),
    "another shape": (put_in("keys", 0, ["x", "float32", [9, 8], 0]), "hold 63 elements"),
    "fewer dimensions": (put_in("keys", 0, ["x", "float32", [63], 0]), "other dimensions"),
    "wide numbers": (put("columns", ["u8"] * 4), "its header says"),
    "signed numbers": (put("columns", ["i8"] * 4), "'columns' must be"),
    "objects": (put("columns", ["O", "O", "O", "O"]), "'columns' must be"),
    "three columns": (put("columns", ["u1"] * 3), "'columns' must be"),
    "the path of no key": (put_in("paths", 0, 1 << 40), "a key that is not there"),
    "a negative path": (put_in("paths", 0, -1), "a key that is not there"),
    "a path of objects": (put_in("paths", 0, ["x", {}]), "a path must be"),
    "a short path": (put_in("paths", 0, ["x"]), "a path must be"),
    "two paths": (lambda header: header["paths"].__setitem__(0, header["paths"][1]), "two paths"),
    "no version": (put("version", None), "'version' must be strings"),
    "an id of numbers": (put("save_id", [1]), "'version' must be strings"),
}


def with_header(data: bytes, edit: Callable[[Header], None] | bytes) -> bytes:
    """Return an index whose header was changed."""
    length = int.from_bytes(data[17:25], "little")
    if isinstance(edit, bytes):
        text = edit
    else:
        header = json.loads(data[25 : 25 + length])
        edit(header)
        text = json.dumps(header).encode()
    return data[:17] + len(text).to_bytes(8, "little") + text + data[25 + length :]


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_may_not_say_anything(sample: Path, name: str) -> None:
    """Refused before memory is taken for it."""
    edit, message = HEADERS[name]
    write_index(sample, with_header((sample / INDEX_NAME).read_bytes(), edit))
    with pytest.raises(CheckpointError, match=f"{INDEX_NAME}.*({message})"):
        OpenCheckpoint(sample)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "not JSON"),
        (b"\xff", "not JSON"),
        (b"3", "has not the keys"),
        (b'{"keys":[],"keys":[]}', "occurs twice"),
        (b"", "not JSON"),
    ],
)
def test_a_header_that_is_none(sample: Path, text: bytes, message: str) -> None:
    """Whatever stands there."""
    write_index(sample, with_header((sample / INDEX_NAME).read_bytes(), text))
    with pytest.raises(CheckpointError, match=message):
        OpenCheckpoint(sample)


def cut_of(table: ChunkTable, key: str) -> int:
    """The number of the cut of a key."""
    return int(table.cut_of[list(table.kinds).index(key)])


def with_cut(*regions: tuple[tuple[int, ...], tuple[int, ...]]) -> Callable[[ChunkTable], ChunkTable]:
    """Give ``model.a`` another cut, with as many chunks as it has regions."""

    def edit(table: ChunkTable) -> ChunkTable:
        position = list(table.kinds).index("model.a")
        first, stop = table.first_rows()[position : position + 2]
        cuts, numbers = [*table.cuts, np.array(regions, np.int64)], table.cut_of.copy()
        numbers[position] = len(table.cuts)
        kept = [*range(first), *range(first, first + len(regions)), *range(stop, len(table.ranges))]
        ranges = table.ranges.copy()
        # Long enough for any region, and all of them apart.
        ranges[first : first + len(regions), 1] = ranges[:, 1].max() + 4000 * np.arange(1, len(regions) + 1)
        ranges[first : first + len(regions), 2] = 4000
        assert table.hashes is not None
        return replace(table, cuts=cuts, cut_of=numbers, ranges=ranges[kept], hashes=table.hashes[kept])

    return edit


def moved(column: int, value: int) -> Callable[[ChunkTable], ChunkTable]:
    """Change a number of the first chunk of ``model.a``."""

    def edit(table: ChunkTable) -> ChunkTable:
        ranges = table.ranges.copy()
        ranges[table.first_rows()[list(table.kinds).index("model.a")], column] = value
        return replace(table, ranges=ranges)

    return edit


def shared(table: ChunkTable) -> ChunkTable:
    """Give two tensors the same bytes."""
    firsts, keys = table.first_rows(), list(table.kinds)
    ranges = table.ranges.copy()
    ranges[firsts[keys.index("model.b")]] = ranges[firsts[keys.index("model.c")]]
    return replace(table, ranges=ranges)


EDITS: dict[str, tuple[Callable[[ChunkTable], ChunkTable], str]] = {
    "a hole": (with_cut(((0, 0), (4, 7)), ((5, 0), (4, 7))), "hold 56 elements"),
    "an overlap": (with_cut(((0, 0), (5, 7)), ((4, 0), (4, 7))), "overlap"),
    "an overlap of boxes": (with_cut(((0, 0), (9, 4)), ((0, 3), (9, 3))), "overlap"),
    "a region outside": (with_cut(((0, 1), (9, 7))), "not inside"),
    "a region far outside": (with_cut(((0, 0), ((1 << 62) - 1, (1 << 62) - 1))), "not inside"),
    "two at one place": (with_cut(((0, 0), (9, 7)), ((0, 0), (0, 7))), "begin at one place"),
    "a chunk that is too short": (moved(2, 3), "needs .* bytes, but"),
    "a chunk beyond the file": (moved(1, 1 << 60), "file is truncated"),
    "a file that is not there": (moved(0, 9), "a file that it does not list"),
    "bytes that two tensors share": (shared, "overlap in __"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_index_that_does_not_fit_is_refused(sample: Path, name: str) -> None:
    """Regions and ranges are checked as those of ``.metadata`` are."""
    edit, message = EDITS[name]
    # So that there is room for what is moved.
    for file in sample.glob("*.distcp"):
        with file.open("ab") as opened:
            opened.truncate(1 << 20)
    resign(sample)
    write_table(sample, edit(OpenCheckpoint(sample).table()))
    with pytest.raises(CheckpointError, match=message):
        OpenCheckpoint(sample)


@pytest.mark.parametrize(
    "regions",
    [
        [((0, 0), (9, 4)), ((0, 4), (9, 3))],
        [((0, 0), (9, 4)), ((0, 4), (5, 3)), ((5, 4), (4, 3)), ((9, 7), (0, 0))],
        [((5, 0), (4, 7)), ((0, 0), (5, 7))],
    ],
)
def test_regions_in_any_order_and_of_any_form_are_taken(sample: Path, regions: Iterable[Any]) -> None:
    """As DTensors have them."""
    table = with_cut(*regions)(OpenCheckpoint(sample).table())
    check_table(table, {source.relative_path: 1 << 20 for source in table.sources}, "here")


def test_verify_compares_the_index_with_the_metadata(sample: Path, tmp_path: Path) -> None:
    """Each fits the files and is signed, and one is another save's: DCP would load other tensors than this package."""
    run("gloo", 4, save, str(tmp_path / "other"), 1)
    table = OpenCheckpoint(sample).table()
    firsts, keys = table.first_rows(), list(table.kinds)
    # model.a and its average are cut alike: with their places exchanged.
    ranges = table.ranges.copy()
    a, b = (slice(firsts[n], firsts[n + 1]) for n in map(keys.index, ("optim.state.a.ax", "optim.state.f.ax")))
    assert a.start != b.start
    ranges[a.start], ranges[b.start] = table.ranges[b.start], table.ranges[a.start]
    whole = replace(table, planner_data={**(table.planner_data or {}), "model.a": ("model", "z")})
    renamed = replace(table, kinds={("model.z" if key == "model.a" else key): k for key, k in table.kinds.items()})
    for wrong, message in ((whole, "belong to different"), (renamed, "different things of model.z")):
        write_index(sample, index.encode(wrong))
        OpenCheckpoint(sample)
        (problem,) = verify(sample).problems
        assert message in problem
        assert ".metadata" in problem
    shutil.copy(tmp_path / "other" / ".metadata", sample / ".metadata")
    write_table(sample, table)
    assert verify(sample).problems == [f"{sample / '.metadata'} and {INDEX_NAME} belong to different checkpoints."]


def test_files_of_another_save_are_told_apart(sample: Path, tmp_path: Path) -> None:
    """The index of another step, of the same size, is not taken for this one's."""
    run("gloo", 4, save, str(tmp_path / "saved2"), 1)
    shutil.copy(tmp_path / "saved2" / INDEX_NAME, sample / INDEX_NAME)
    with pytest.raises(CheckpointError, match=INDEX_NAME):
        OpenCheckpoint(sample)


def test_a_report_is_what_was_written() -> None:
    """Ranks that disagree about a tensor are an error that names it."""
    from dist_asgd.checkpoint.format.file_report import packed, table_of, unpacked
    from dist_asgd.checkpoint.format.writer import Row, WrittenFile

    def report(rank: int, *rows: Row) -> WrittenFile:
        chunks = [Chunk(10 * number, 10, hash_of(bytes([rank, number]))) for number in range(len(rows))]
        return WrittenFile({}, f"__{rank}_0.distcp", FileEntry(1000, "0" * 32), chunks, rows)

    def row(number: int, at: int, rows: int, dtype: torch.dtype = torch.float32, key: str = "model.w") -> Row:
        return Row(key, number, dtype, (4, 3), (at, 0), (rows, 3))

    first = report(0, row(0, 0, 2), row(1, 0, 4, key="model.v"), Row("optim.x", 2), row(3, 4, 0))
    second = report(1, row(0, 2, 2), row(1, 0, 4, key="model.v"), Row("optim.x", 2), row(3, 4, 0), row(4, 0, 0))
    table = table_of(Path("saved"), unpacked(map(packed, (first, second))))
    assert list(table.kinds) == ["model.w", "model.v", "optim.x"]
    # Of two copies the first, of two objects the last; empty regions once, and not in the place of others.
    assert [cut[:, 0, 0].tolist() for cut in table.cuts] == [[0, 4, 2], [0]]
    assert table.ranges[:, 0].tolist() == [0, 0, 1, 0, 1]
    assert table.ranges[:, 1].tolist() == [0, 30, 0, 10, 20]
    assert table.hashes is not None
    assert table.hashes[2].tobytes().hex() == second.chunks[0].xxh3_128
    assert table.planner_data == {key: tuple(key.split(".")) for key in table.kinds}
    other = report(1, row(0, 2, 2, torch.float64))
    with pytest.raises(ValueError, match=r"model.w as \[4, 3\] float64, and a rank before it as \[4, 3\] float32"):
        table_of(Path("saved"), unpacked(map(packed, (first, other))))
