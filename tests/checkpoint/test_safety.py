"""Loading executes nothing, opens nothing outside the directory, and takes no memory that the files do not have.

Every hostile sample is signed: its manifest fits it, as an attacker would see to.
"""

import io
import json
import os
import pickle
import random
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata

from dist_asgd.checkpoint.format.archives import load_object
from dist_asgd.checkpoint.format.manifest import MANIFEST_NAME, CheckpointError, decode, encode, hash_of, read_manifest
from dist_asgd.checkpoint.format.metadata import METADATA_NAME
from dist_asgd.checkpoint.format.reader import OpenCheckpoint
from tests.harness.bits import same_tree
from tests.harness.checkpoints import (
    Payload,
    archive,
    edited_metadata,
    index_of,
    load,
    put_chunk,
    read_all,
    read_metadata,
    resign,
    sample_state,
    saved,
    sign,
    write_sample,
)


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A checkpoint of one process."""
    return write_sample(tmp_path / "checkpoint")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """The file that a payload would create."""
    return tmp_path / "canary"


def refused(directory: Path, message: str, verify: bool = True) -> None:
    """Assert that ``OpenCheckpoint`` and ``dcp.load`` raise an error that matches."""
    with pytest.raises(CheckpointError, match=message):
        read_all(directory, verify=verify)
    with pytest.raises((CheckpointError, dcp.CheckpointException), match=message):
        load(directory, verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_a_good_checkpoint_loads(sample: Path, verify: bool) -> None:
    """A checkpoint reads to the bit, plain values too; without a manifest only with ``verify=False``."""
    assert same_tree(load(sample, verify=verify), sample_state())
    assert OpenCheckpoint(sample).metadata.state_dict_metadata == read_metadata(sample).state_dict_metadata
    assert OpenCheckpoint(sample).metadata.storage_data == read_metadata(sample).storage_data
    assert OpenCheckpoint(sample).metadata.planner_data == read_metadata(sample).planner_data
    (sample / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"has no manifest\.json.*verify=False"):
        load(sample)
    assert same_tree(load(sample, verify=False), sample_state())


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path) -> None:
    """A missing path, a file and an empty directory are no checkpoints."""
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("nothing", "there is no checkpoint at"),
        ("file", "is not a directory"),
        ("empty", "neither manifest.json nor .metadata"),
    ):
        with pytest.raises(CheckpointError, match=message):
            OpenCheckpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"\.metadata is missing"):
        OpenCheckpoint(tmp_path / "empty", verify=False)


# --- .metadata ---------------------------------------------------------------------------------------------


def in_metadata(place: str, payload: Payload) -> bytes:
    """Return a pickle of DCP's metadata with a payload at one place in it."""
    metadata = Metadata({}, {}, {})
    if place == "instead":
        return pickle.dumps(payload)
    if place == "before":
        return pickle.dumps(payload)[:-1] + b"0" + pickle.dumps(metadata)[2:]
    if place == "keys":
        metadata.state_dict_metadata = {"weight": payload}  # type: ignore[dict-item]
    elif place == "storage":
        metadata.storage_data = {payload: payload}
    elif place == "planner":
        metadata.planner_data = {"weight": ("model", payload)}
    elif place == "chunks":
        entry = TensorStorageMetadata(dcp.metadata.TensorProperties(), torch.Size([1]), [payload])  # type: ignore[list-item]
        metadata.state_dict_metadata = {"weight": entry}
    elif place == "version":
        metadata.version = payload  # type: ignore[assignment]
    else:
        metadata.storage_meta = dcp.metadata.StorageMeta(checkpoint_id=payload)  # type: ignore[arg-type]
    return pickle.dumps(metadata)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "place", ["instead", "before", "keys", "storage", "planner", "chunks", "version", "storage_meta"]
)
def test_metadata_runs_nothing(sample: Path, canary: Path, place: str, verify: bool) -> None:
    """A payload in ``.metadata`` does not run, wherever it is; ``pickle`` would run it."""
    data = in_metadata(place, Payload(canary))
    pickle.loads(data)
    assert canary.is_dir()
    canary.rmdir()
    (sample / METADATA_NAME).write_bytes(data)
    resign(sample)
    refused(sample, r"metadata is damaged.*(mkdir|opcode)", verify)
    assert not canary.exists()


def short(text: str) -> bytes:
    """Return the opcode that pushes a string."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


def named(module: str, name: str) -> bytes:
    """Return the opcodes that look up a name."""
    return short(module) + short(name) + b"\x93"


_META = "torch.distributed.checkpoint.metadata"
_TWICE = b")\x94" + b"".join(b"h" + bytes([n]) + b"\x86\x94" for n in range(60))
OPCODES: dict[str, bytes] = {
    "GLOBAL": b"cos\nmkdir\n.",
    "INST": b"(ios\nmkdir\n.",
    "OBJ": b"(" + named(_META, "Metadata") + b"o.",
    "PERSID": b"Pname\n.",
    "BINPERSID": b"NQ.",
    "EXT1": b"\x82\x01.",
    "NEWOBJ_EX": named(_META, "Metadata") + b")}\x92.",
    "a name that is not DCP's": named("posix", "system") + b".",
    "a name inside DCP": named(_META, "os.system") + b".",
    "dataclass code": named("dataclasses", "make_dataclass") + b".",
    "builtins": named("builtins", "getattr") + b".",
    "a class as the result": named(_META, "Metadata") + b".",
    "state for a class": named(_META, "Metadata") + b"N}" + short("__eq__") + b"Ns\x86b.",
    "state for a function": named("torch.serialization", "_get_layout") + b"N}" + short("__defaults__") + b")s\x86b.",
    "a discarded mark that is not there": b"N1.",
    "a result that was discarded": b"(N1.",
    "an index of numbers": named(_META, "MetadataIndex") + b"K\x01K\x02\x86R.",
    "an index without a name": named(_META, "MetadataIndex") + b")R.",
    "an index with a plain offset": named(_META, "MetadataIndex") + short("x") + b"K\x02\x85\x86R.",
    "a place outside": named("torch.distributed.checkpoint.filesystem", "_StorageInfo") + short("../x") + b"NN\x87R.",
    "a place of four": named("torch.distributed.checkpoint.filesystem", "_StorageInfo") + b"(NNNNtR.",
    "a region of numbers": named(_META, "ChunkStorageMetadata") + b"K\x01K\x02\x86R.",
    "a region of one": named(_META, "ChunkStorageMetadata") + b"K\x01\x85R.",
    "a tensor of nothing": named(_META, "TensorStorageMetadata") + b")R.",
    "a tensor of lists": named(_META, "TensorStorageMetadata") + b"]]]\x87R.",
    "a class that is called": named(_META, "Metadata") + b"}\x85R.",
    "an object with arguments": named(_META, "Metadata") + b"}\x85\x81.",
    "BYTEARRAY8 of 2^60 bytes": b"\x96" + struct.pack("<Q", 1 << 60) + b".",
    "BINUNICODE8 of 2^60 bytes": b"\x8d" + struct.pack("<Q", 1 << 60) + b".",
    "BINUNICODE of 2^31 bytes": b"X" + struct.pack("<I", 1 << 31) + b".",
    "LONG_BINPUT at 2^31": b"Nr" + struct.pack("<I", 1 << 31) + b".",
    "LONG4 of 2^30 bytes": b"\x8b" + struct.pack("<I", 1 << 30) + b".",
    "LONG1 of 200 bytes": b"\x8a\xc8" + bytes(200) + b".",
    "DUP": b"N22.",
    "a huge size": named("torch", "Size") + b"\x8a\x09" + b"\xff" * 8 + b"\x00\x85\x85R.",
    "a negative size": named("torch", "Size") + b"J\xff\xff\xff\xff\x85\x85R.",
    "a size of strings": named("torch", "Size") + short("x") + b"\x85\x85R.",
    "tuples in tuples, 2^60 of them, as a key": b"}" + _TWICE + b"Ns.",
    "tuples in tuples, 2^60 of them, as a size": named("torch", "Size") + _TWICE + b"\x85R.",
    "lists in lists, a hundred thousand deep": b"]" * 100_000 + b"a" * 99_999 + b".",
    "tuples in tuples, a hundred thousand deep": b")" + b"\x85" * 100_000 + b".",
    "a list in itself": b"]\x94h\x00a.",
    "an object in its own state": named(_META, "Metadata") + b")\x81\x94h\x00b.",
    "an object without state": named(_META, "Metadata") + b")\x81.",
    "state twice": named(_META, "StorageMeta") + b")\x81}b}b.",
    "a key twice": b"}(" + (short("k") + b"N") * 2 + b"u.",
    "half an item": b"}(" + short("k") + b"u.",
    "no memo": b"h\x00.",
    "no mark": b"Nt.",
    "no operand": b"\x86.",
    "no text": b"\x8c\x02\xff\xfe.",
    "a mark as a value": b"(\x85.",
    "two results": b"NN.",
    "more after the end": b"N.N",
    "no end": b"N",
    "another protocol": b"\x80\x02N.",
    "something else": b"N.",
    "": b"",
}


@pytest.mark.parametrize("name", OPCODES)
def test_metadata_may_say_only_what_dcp_says(sample: Path, name: str) -> None:
    """Every opcode and name that DCP does not write is refused, at once and without allocating memory for it."""
    kept = Metadata.__eq__, torch.serialization._get_layout.__defaults__
    (sample / METADATA_NAME).write_bytes(OPCODES[name])
    resign(sample)
    refused(sample, r"metadata is damaged")
    assert (Metadata.__eq__, torch.serialization._get_layout.__defaults__) == kept


def test_what_was_checked_cannot_change_later() -> None:
    """A list that the pickle appends to after an entry was made with it does not change the entry."""
    from dist_asgd.checkpoint.format.metadata import parse

    entry = TensorStorageMetadata(dcp.metadata.TensorProperties(), torch.Size([0]), [])
    metadata = Metadata({"k": entry}, {}, {})
    late: list[Any] = [metadata, entry.chunks]
    data = pickle.dumps(late)
    # [metadata, chunks]: take the list of chunks, append None to it, drop both, give the metadata.
    assert isinstance(pickle.loads(data), list)
    with pytest.raises(CheckpointError, match="no Metadata"):
        parse(data, "here")
    good = parse(pickle.dumps(metadata), "here")
    assert good.state_dict_metadata["k"].chunks == []


Edit = Callable[[Metadata], None]


def tensor(metadata: Metadata) -> TensorStorageMetadata:
    """Return the entry of the 3x5 tensor."""
    entry = metadata.state_dict_metadata["model.weight"]
    assert isinstance(entry, TensorStorageMetadata)
    return entry


def resize(size: tuple[int, ...]) -> Edit:
    """Give the whole tensor and its one chunk another shape."""

    def edit(metadata: Metadata) -> None:
        entry = tensor(metadata)
        entry.size = torch.Size(size)
        entry.chunks[0].sizes = torch.Size(size)

    return edit


def split(*boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> Edit:
    """Replace the chunks by others that all have the data of the real one."""

    def edit(metadata: Metadata) -> None:
        index = index_of(metadata, "model.weight")
        info = metadata.storage_data.pop(index)
        tensor(metadata).chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in boxes]
        for start, (offsets, _) in enumerate(boxes):
            length = info.length // len(boxes)
            place = _StorageInfo(info.relative_path, info.offset + start * length, length)
            metadata.storage_data[dcp.metadata.MetadataIndex("model.weight", offsets)] = place

    return edit


def move(**fields: Any) -> Edit:
    """Move the byte range of the tensor's data."""

    def edit(metadata: Metadata) -> None:
        for name, value in fields.items():
            setattr(metadata.storage_data[index_of(metadata, "model.weight")], name, value)

    return edit


def share(metadata: Metadata) -> None:
    """Give two tensors the same bytes: ten thousand such tensors would load ten thousand times the file."""
    place = metadata.storage_data[index_of(metadata, "model.weight")]
    metadata.storage_data[index_of(metadata, "optim.state.weight.ax")] = place


def forget(metadata: Metadata) -> None:
    """Remove the byte range of a tensor's data."""
    del metadata.storage_data[index_of(metadata, "model.weight")]


def orphan(metadata: Metadata) -> None:
    """Add a byte range for a key that does not exist."""
    del metadata.state_dict_metadata["model.weight"]


EDITS: dict[str, tuple[Edit, str]] = {
    "a tensor of 2^60 bytes": (resize((1 << 29, 1 << 29)), "needs 1152921504606846976 bytes"),
    "a tensor a little too large": (resize((30, 50)), "needs 6000 bytes"),
    "sizes that overflow 64 bits": (resize((1 << 61, 1 << 61)), "needs"),
    "a negative size": (resize((-3, 5)), "a size that is negative"),
    "chunks that overlap": (split(((0, 0), (2, 5)), ((1, 0), (1, 5))), "chunks of model.weight overlap"),
    "chunks that overlap in one element": (split(((0, 0), (2, 4)), ((1, 3), (1, 5)), ((0, 4), (1, 1))), "not inside"),
    "chunks that leave a hole": (split(((0, 0), (1, 5)), ((2, 0), (1, 5))), "hold 10 elements"),
    "a short chunk": (split(((0, 0), (3, 4))), "hold 12 elements"),
    "a chunk outside": (split(((0, 1), (3, 5))), "not inside"),
    "a chunk of other dimensions": (split(((0,), (15,))), "not inside"),
    "no chunks": (split(), "hold 0 elements"),
    "a length of 2^60": (move(length=1 << 60), "file is truncated"),
    "an offset of 2^60": (move(offset=1 << 60), "file is truncated"),
    "a negative offset": (move(offset=-8), "where the data of a chunk lies"),
    "a negative length": (move(length=-8), "where the data of a chunk lies"),
    "a length that is no number": (move(length=1.5), "metadata is damaged"),
    "transformed data": (move(transform_descriptors=["zstd"]), "a DCP extension has transformed, 'zstd'"),
    "extensions that are none": (move(transform_descriptors=3), "the extensions of DCP"),
    "an absolute path": (move(relative_path="/etc/passwd"), "'/etc/passwd'"),
    "a path out": (move(relative_path="../secret"), "'../secret'"),
    "the parent": (move(relative_path=".."), "'..'"),
    "a path through a folder": (move(relative_path="a/b"), "'a/b'"),
    "a path with a zero": (move(relative_path="a\0b"), r"'a\\x00b'"),
    "an empty path": (move(relative_path=""), "''"),
    "a path that is none": (move(relative_path=3), "a file named int"),
    "a file that is not there": (move(relative_path="__9_0.distcp"), "__9_0.distcp is missing"),
    "the manifest as data": (move(relative_path="manifest.json", offset=0, length=200), "manifest.json"),
    "bytes that two tensors share": (share, "overlap in __0_0.distcp"),
    "no place for a chunk": (forget, "does not say where model.weight"),
    "data of no key": (orphan, "which no key has"),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", EDITS)
def test_metadata_that_does_not_fit_is_refused(sample: Path, name: str, verify: bool) -> None:
    """Chunks outside of their tensor or file are refused before anything is read or allocated."""
    edit, message = EDITS[name]
    with edited_metadata(sample) as metadata:
        edit(metadata)
    resign(sample)
    refused(sample, message, verify)


@pytest.mark.parametrize("name", [METADATA_NAME, MANIFEST_NAME])
def test_a_file_of_a_terabyte_is_not_read(sample: Path, name: str) -> None:
    """A sparse file of any size does not make the reader allocate memory."""
    with (sample / name).open("r+b") as file:
        file.truncate(1 << 40)
    if name == METADATA_NAME:
        (sample / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match=f"{name} has 1099511627776 bytes, more than"):
        OpenCheckpoint(sample, verify=name == MANIFEST_NAME)


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [METADATA_NAME, MANIFEST_NAME, "__0_0.distcp"])
@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_only_regular_files_are_opened(sample: Path, tmp_path: Path, name: str, kind: str) -> None:
    """Links, which may lead anywhere, and pipes, which may block for ever, are refused."""
    outside = (sample / name).rename(tmp_path / "outside")
    if kind == "link":
        (sample / name).symlink_to(outside)
    elif kind == "pipe":
        os.mkfifo(sample / name)
    else:
        (sample / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"{name} is (a symbolic link|not a regular file)"):
        read_all(sample, verify=True)
    if name != MANIFEST_NAME:
        with pytest.raises(CheckpointError, match=rf"{name} is (a symbolic link|not a regular file)"):
            read_all(sample, verify=False)


# --- tensors and objects -----------------------------------------------------------------------------------


def rebuilt(storage_numel: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """Return the archive of a tensor whose pickle has these numbers; its storage has 60 bytes."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", storage_numel) if isinstance(value, Storage) else None

    class Tensor:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Storage(), 0, size, stride, False, OrderedDict())

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(Tensor())
    return archive(stream.getvalue(), {"0": bytes(60)})


def scripted() -> bytes:
    """Return a TorchScript archive, which holds code."""
    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), stream)
    return stream.getvalue()


def saved_legacy(value: Any) -> bytes:
    """Return a tensor in the format that ``torch.save`` had in 2019."""
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def two_pickles() -> bytes:
    """Return an archive with two pickles, of which readers may take either."""
    stream = io.BytesIO(archive(pickle.dumps(1.0, protocol=2)))
    with zipfile.ZipFile(stream, "a") as file:
        file.writestr("other/data.pkl", pickle.dumps(2.0, protocol=2))
    return stream.getvalue()


_TOWER = b"\x80\x02}()q\x00" + b"".join(b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(60)) + b"K\x01u."
CHUNKS: dict[str, Callable[[Payload], bytes]] = {
    "a payload": lambda payload: archive(pickle.dumps(payload, protocol=2)),
    "a payload beside a value": lambda payload: archive(pickle.dumps([1.0, payload], protocol=2)),
    "a payload in torch's old format": saved_legacy,
    "a bare pickle": pickle.dumps,
    "a bare pickle of another protocol": lambda payload: pickle.dumps(payload, protocol=0),
    "TorchScript": lambda _: scripted(),
    "a zip bomb": lambda _: archive(pickle.dumps(1.0, protocol=2), {"0": bytes(20_000_000)}, zipfile.ZIP_DEFLATED),
    "no archive": lambda _: b"x" * 5000,
    "an archive cut short": lambda _: saved(torch.zeros(3, 5))[:-40],
    "an archive without its pickle": lambda _: saved(torch.zeros(3, 5)).replace(b"data.pkl", b"data.pki"),
    "a class of torch": lambda _: archive(pickle.dumps(torch.nn.Linear(1, 1), protocol=2)),
    "a function of numpy": lambda _: archive(b"cnumpy\nfromfile\n(X\x01\x00\x00\x00xtR."),
    "an object through __setstate__": lambda _: archive(b"ccollections\nUserDict\n)\x81}b."),
    "tuples in tuples, 2^60 of them, as a key": lambda _: archive(_TOWER),
    "a terabyte that is only a number": lambda _: archive(
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R."
    ),
    "an opcode that torch does not write": lambda _: archive(b"\x80\x02K\x010K\x02."),
    "a pickle that takes what it has not put": lambda _: archive(b"\x80\x02h\x05."),
    "two pickles": lambda _: two_pickles(),
    "a hundred thousand lists": lambda _: archive(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("key", ["model.weight", "optim.param_groups.weight.lr", "extra.epoch", "extra.order"])
@pytest.mark.parametrize("name", CHUNKS)
def test_data_runs_nothing(sample: Path, canary: Path, name: str, key: str, verify: bool) -> None:
    """Code in a data file does not run, as a tensor or an object; DCP itself loads objects with weights_only=False."""
    put_chunk(sample, key, CHUNKS[name](Payload(canary)))
    refused(sample, f"{key}", verify)
    assert not canary.exists()


def test_archives_need_no_checksums(sample: Path) -> None:
    """Archives without torch's checksums load."""
    from torch.utils.serialization import config

    with config.patch("save.compute_crc32", False):
        data = saved((3, "three"))
    put_chunk(sample, "extra.order", data)
    assert load(sample)["extra"]["order"] == (3, "three")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two pickles", "2 records data.pkl"),
        ("an archive without its pickle", "0 records data.pkl"),
        ("tuples in tuples, 2^60 of them, as a key", "would take for ever"),
        ("a terabyte that is only a number", "builtins bytearray"),
        ("an opcode that torch does not write", "the opcode POP"),
        ("a pickle that takes what it has not put", "takes what it has not put"),
        ("a zip bomb", "is compressed"),
        ("a payload in torch's old format", "does not begin as"),
    ],
)
def test_what_may_cost_anything_is_refused_before_torch_sees_it(
    name: str, message: str, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pickles that would cost torch's loader too much time or memory are refused before it sees them."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    with pytest.raises(CheckpointError, match=message):
        load_object(CHUNKS[name](Payload(canary)), "the value")


def test_plain_values_load(sample: Path) -> None:
    """Values that users have are not refused: generator states, bytes, sets, long and shared lists."""
    shared = [1.5] * 1000
    values: dict[str, Any] = {
        "random": random.Random(0).getstate(),
        "torch": torch.get_rng_state(),
        "bytes": b"\x00\xff",
        "set": {1, 2},
        "ordered": OrderedDict(a=1),
        "many": (list(range(200_000)), {str(n): n for n in range(1000)}),
        "shared": ([shared] * 1000,),
        "nested": ({"a": [({"b": None},)]}, 1 << 70, -1, 1 << 40, True, 1 + 2j, torch.float32, torch.Size([3])),
        "scheduler": {"base_lrs": [0.1], "last_epoch": 3, "_step_count": 4},
    }
    put_chunk(sample, "extra.order", saved(values))
    assert same_tree(load(sample)["extra"]["order"], values)


def test_the_payload_is_a_real_one(sample: Path, canary: Path) -> None:
    """DCP's own reader runs the same payload."""
    put_chunk(sample, "extra.epoch", CHUNKS["a payload"](Payload(canary)))
    dcp.load({"extra": {"epoch": 0}}, checkpoint_id=sample, no_dist=True)
    assert canary.is_dir()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (saved(torch.zeros(5, 3)), r"holds a tensor \[5, 3\]"),
        (saved(torch.zeros(3, 5, dtype=torch.float64)), "torch.float64"),
        (saved(torch.zeros(3, 5).to_sparse()), "no plain tensor"),
        (saved(torch.nn.Parameter(torch.zeros(3, 5))), "no plain tensor"),
        (saved([torch.zeros(3, 5)]), "no plain tensor"),
        (saved(torch.empty(3, 5, device="meta")), "no plain tensor"),
        (rebuilt(15, (1 << 40, 5), (0, 1)), r"holds a tensor \[1099511627776, 5\]"),
        (rebuilt(1 << 40, (3, 5), (5, 1)), "model.weight"),
        (rebuilt(15, (3, 5), (1 << 40, 1)), "model.weight"),
        (rebuilt(15, (3, 5), (5, 2)), "model.weight"),
    ],
    ids=["shape", "dtype", "sparse", "parameter", "list", "meta", "expanded", "storage", "stride", "past the end"],
)
def test_a_chunk_is_the_tensor_that_the_metadata_says(sample: Path, data: bytes, message: str) -> None:
    """A tensor must have its shape and dtype, be plain, and lie inside its own storage."""
    put_chunk(sample, "model.weight", data)
    refused(sample, message)


# --- manifest.json -----------------------------------------------------------------------------------------


def manifest_body(sample: Path) -> dict[str, Any]:
    """Return the manifest as parsed JSON, without its own hash."""
    body = json.loads((sample / MANIFEST_NAME).read_text())
    del body["xxh3_128"]
    return body  # type: ignore[no-any-return]


def dumped(body: Any) -> bytes:
    """Return a manifest as ``encode`` does, with the right hash of its own."""
    form: dict[str, Any] = {"sort_keys": True, "separators": (",", ":")}
    own = hash_of(json.dumps(body, **form).encode() + b"\n")
    return json.dumps({**body, "xxh3_128": own}, **form).encode() + b"\n"


def changed(body: dict[str, Any], where: str, value: Any) -> dict[str, Any]:
    """Return the body with ``value`` at a path such as ``files/__0_0.distcp/bytes``."""
    *path, last = where.split("/")
    inner: Any = body
    for part in path:
        inner = inner[int(part) if isinstance(inner, list) else part]
    inner[int(last) if isinstance(inner, list) else last] = value
    return body


_DATA = "__0_0.distcp"
_HEX = "0" * 32


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("format", "1"),
        ("format", True),
        ("dist_asgd", 3),
        ("step", -1),
        ("step", 1.5),
        ("step", 1 << 80),
        ("step", True),
        ("step", None),
        ("step", float("nan")),
        ("step", float("inf")),
        ("world_size", 0),
        ("world_size", -1),
        ("files", []),
        ("files", None),
        ("files/" + _DATA, 3),
        ("files/" + _DATA, {}),
        ("files/" + _DATA, {"bytes": -1, "xxh3_128": _HEX}),
        ("files/" + _DATA, {"bytes": 1 << 70, "xxh3_128": _HEX}),
        ("files/" + _DATA, {"bytes": 3.0, "xxh3_128": _HEX}),
        ("files/" + _DATA, {"bytes": 3, "xxh3_128": "0"}),
        ("files/" + _DATA, {"bytes": 3, "xxh3_128": "x" * 32}),
        ("files/" + _DATA, {"bytes": 3, "xxh3_128": _HEX, "more": 1}),
        ("files/../secret", {"bytes": 3, "xxh3_128": _HEX}),
        ("files/..", {"bytes": 3, "xxh3_128": _HEX}),
        ("files/manifest.json", {"bytes": 3, "xxh3_128": _HEX}),
        ("chunks", []),
        ("chunks/nowhere", []),
        ("chunks/" + _DATA, {}),
        ("chunks/" + _DATA + "/0", [0, 8]),
        ("chunks/" + _DATA + "/0", [-8, 8, _HEX]),
        ("chunks/" + _DATA + "/0", [0, 1 << 62, _HEX]),
        ("chunks/" + _DATA + "/0", [0, "8", _HEX]),
        ("chunks/" + _DATA + "/1", [0, 1, _HEX]),
        ("chunks/" + _DATA + "/0", [0, 8, 8]),
        ("more", 1),
    ],
)
def test_a_manifest_of_other_content_is_refused(sample: Path, where: str, value: Any) -> None:
    """Wrong types, numbers, names and keys are refused, although the manifest's own hash is right."""
    if where.startswith("files/.."):
        body = manifest_body(sample)
        body["files"][where.removeprefix("files/")] = value
    else:
        body = changed(manifest_body(sample), where, value)
    (sample / MANIFEST_NAME).write_bytes(dumped(body))
    refused(sample, r"manifest\.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"[]", "wanted the keys"),
        (b"null", "wanted the keys"),
        (b'{"format":1,"format":1}', "a key occurs twice"),
        (b'{"format":NaN}', "NaN is not a number here"),
        (b'{"format":-Infinity}', "-Infinity is not"),
        (b'{"format":' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "not JSON"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "not JSON"),
        (b"\xff\xfe{", "not JSON"),
        (b'{"format":1} x', "not JSON"),
    ],
)
def test_a_manifest_that_is_no_manifest_is_refused(sample: Path, data: bytes, message: str) -> None:
    """Any text gives a manifest or a CheckpointError, whether it is JSON or not."""
    (sample / MANIFEST_NAME).write_bytes(data)
    refused(sample, message)


def test_a_manifest_has_one_form(sample: Path) -> None:
    """Spaces, another order and escapes are damage, and a duplicated key is named even with the right hash."""
    good = (sample / MANIFEST_NAME).read_bytes()
    manifest = read_manifest(sample)
    assert manifest is not None
    assert encode(manifest) == good
    assert decode(good, sample) == manifest
    for data in (good.replace(b",", b", ", 1), good + b"\n", good.replace(b'"step"', b'"st\\u0065p"')):
        with pytest.raises(CheckpointError, match="the hash that it gives itself"):
            decode(data, sample)
    twice = good.replace(b'"step":', b'"step":4,"step":', 1)
    with pytest.raises(CheckpointError, match="a key occurs twice"):
        decode(twice, sample)


def test_a_later_format_says_which_version_to_use(sample: Path) -> None:
    """A manifest of another format is an error that says so, and not damage."""
    (sample / MANIFEST_NAME).write_bytes(dumped(changed(manifest_body(sample), "format", 3)))
    with pytest.raises(CheckpointError, match="has format 3, this version reads 1 and 2: use the version of dist_asgd"):
        OpenCheckpoint(sample)


def test_python_limits_are_as_they_were(sample: Path) -> None:
    """Reading changes no global setting."""
    before = sys.getrecursionlimit(), torch.serialization.get_safe_globals()
    sign(sample)
    load(sample)
    assert (sys.getrecursionlimit(), torch.serialization.get_safe_globals()) == before
