"""Checkpoints that DCP has written in other ways: by old releases, without collectives, compressed, as safetensors."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as OldProperties
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, HuggingFaceStorageWriter
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension, ZStandard
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.fsdp import fully_shard
from typer.testing import CliRunner

from dist_asgd import ShardedASGD, load_checkpoint
from dist_asgd.checkpoint.format.compression import decompressed
from dist_asgd.checkpoint.format.manifest import CheckpointError
from dist_asgd.checkpoint.format.metadata import METADATA_NAME, parse
from dist_asgd.checkpoint.format.reader import CheckedReader, OpenCheckpoint
from dist_asgd.cli import app
from tests.harness.bits import same_tree
from tests.harness.checkpoints import edited_metadata, index_of, read_all, read_metadata
from tests.harness.ranks import run, run_errors

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
_DISTRIBUTED = "torch.distributed."


class Flip(StreamTransformExtension):
    """An extension of somebody's own, which turns every bit around."""

    @staticmethod
    def registry_name() -> str:
        """Return its name."""
        return "stream.flip"

    @staticmethod
    def from_descriptor(version: str) -> Flip:  # noqa: ARG004
        """Return one."""
        return Flip()

    def get_descriptor(self) -> str:
        """Return its name and version."""
        return "stream.flip/1"

    def transform_to(self, output: Any) -> Any:
        """Return a stream that writes to ``output``."""
        whole = io.BytesIO()
        close = whole.close

        def end() -> None:
            output.write(bytes(255 - byte for byte in whole.getvalue()))
            close()

        whole.close = end  # type: ignore[method-assign]
        return whole

    def transform_from(self, input: Any) -> Any:
        """Return a stream that reads from ``input``."""
        return io.BytesIO(bytes(255 - byte for byte in input.read()))


def made(fill: float | None = None, sharded: bool = False) -> nn.Sequential:
    """Return a model, the same each time unless ``fill`` gives its values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 24), nn.BatchNorm1d(24), nn.Linear(24, 2))
    if fill is not None:
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(fill)
    if sharded:
        fully_shard(model)
    return model


def trained(kind: str = "plain") -> tuple[nn.Sequential, Any]:
    """Return a model and the optimizer that has trained it, on each rank with the same data."""
    model = made(sharded=kind == "fsdp2")
    stage2 = kind == "stage2"
    optimizer: Any = (ShardedASGD if stage2 else torch.optim.ASGD)(
        model.named_parameters(), lr=0.1, t0=0, **({"stage": 2} if stage2 else {})
    )
    for seed in range(3):
        torch.manual_seed(seed)
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state_of(model: nn.Module, optimizer: Any, tensors_only: bool = False) -> dict[str, dict[str, Any]]:
    """Return the state dict that torch's own recipe saves."""
    weights, state = get_state_dict(model, optimizer, options=FLAT)
    kept = {k: v for k, v in state.items() if isinstance(v, Tensor) or not tensors_only}
    return {"model": dict(weights), "optim": kept}


def blank(state: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return a state dict with zeros in place of the tensors."""
    return {
        section: {key: torch.zeros_like(v) if isinstance(v, Tensor) else v for key, v in values.items()}
        for section, values in state.items()
    }


def save(state: dict[str, Any], folder: Path, writer: Any = None, **options: Any) -> None:
    """Call ``dcp.save`` without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder if writer is None else None, storage_writer=writer, **options)


def whole(values: list[Any]) -> list[Tensor]:
    """Return whole copies of tensors and DTensors."""
    return [(v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for v in values]


def loaded(folder: Path, stage: int = 1) -> tuple[nn.Sequential, ShardedASGD]:
    """Load into a new model and optimizer."""
    model = made(7.0)
    optimizer = ShardedASGD(model.named_parameters(), lr=0.5, stage=stage)
    load_checkpoint(folder, model, optimizer, verify=False)
    return model, optimizer


def everything(model: nn.Module, optimizer: ShardedASGD) -> list[Tensor]:
    """Return parameters, buffers and averages."""
    state = optimizer.consolidated_state_dict(to=None)["state"]
    return whole([*model.parameters(), *model.buffers(), *(entry["ax"] for entry in state.values())])


def of_torch(model: nn.Module, optimizer: torch.optim.ASGD) -> list[Tensor]:
    """Return the same of torch's optimizer."""
    averages = [optimizer.state[param]["ax"] for param in model.parameters()]
    return whole([*model.parameters(), *model.buffers(), *averages])


# --- how torch writes ---------------------------------------------------------------------------------------


def as_of_torch_2_2(folder: Path, metadata: Metadata) -> None:
    """Write the metadata as torch 2.0 to 2.2 did: other classes, and fewer fields."""
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            entry.properties = OldProperties(entry.properties.dtype)  # type: ignore[assignment]
    del metadata.__dict__["storage_meta"], metadata.__dict__["version"]
    (folder / METADATA_NAME).write_bytes(pickle.dumps(metadata, protocol=4))


def as_of_torch_1_13(folder: Path, metadata: Metadata) -> None:
    """Write the metadata under the name that the package had in torch 1.13."""
    as_of_torch_2_2(folder, metadata)
    data = (folder / METADATA_NAME).read_bytes()
    for word in ("metadata", "filesystem"):
        new, old = f"{_DISTRIBUTED}checkpoint.{word}", f"{_DISTRIBUTED}_shard.checkpoint.{word}"
        data = data.replace(bytes([len(new)]) + new.encode(), bytes([len(old)]) + old.encode())
    (folder / METADATA_NAME).write_bytes(data)


def saved_old(convert: Callable[[Path, Metadata], None]) -> Callable[[Path, Any, Any], None]:
    """Return a function that saves as an old release did."""

    def save_old(folder: Path, model: Any, optimizer: Any) -> None:
        save(state_of(model, optimizer), folder, no_dist=True)
        convert(folder, read_metadata(folder))

    return save_old


def saved_by(make: Callable[[Path], Any], tensors_only: bool = False) -> Callable[[Path, Any, Any], None]:
    """Return a function that saves with another writer."""

    def save_with(folder: Path, model: Any, optimizer: Any) -> None:
        save(state_of(model, optimizer, tensors_only), folder, make(folder), no_dist=True)

    return save_with


def safetensors_in_distcp(folder: Path) -> FileSystemWriter:
    """Return the writer whose tensors torch cannot read back."""
    return FileSystemWriter(folder, serialization_format=SerializationFormat.SAFETENSORS)


# What is written, and whether it has the hyperparameters.
WRITERS: dict[str, tuple[Callable[[Path, Any, Any], None], bool]] = {
    "torch 2.2": (saved_old(as_of_torch_2_2), True),
    "torch 1.13": (saved_old(as_of_torch_1_13), True),
    "zstd": (saved_by(lambda folder: FileSystemWriter(folder, _extensions=[ZStandard()])), True),
    "zstd in files of their own": (
        saved_by(lambda folder: FileSystemWriter(folder, False, _extensions=[ZStandard()])),
        True,
    ),
    "zstd twice": (saved_by(lambda folder: FileSystemWriter(folder, _extensions=[ZStandard(), ZStandard()])), True),
    "Hugging Face": (saved_by(lambda folder: HuggingFaceStorageWriter(str(folder)), True), False),
    "Hugging Face, sharded": (
        saved_by(lambda folder: HuggingFaceStorageWriter(str(folder), save_distributed=True), True),
        False,
    ),
    "safetensors": (saved_by(safetensors_in_distcp, True), False),
    "safetensors and objects": (saved_by(safetensors_in_distcp), True),
}


@pytest.mark.parametrize("name", WRITERS)
def test_it_loads_and_the_commands_read_it(name: str, tmp_path: Path) -> None:
    """All of it, to the bit, through ``load_checkpoint``, ``dcp.load`` and the command line."""
    if "zstd" in name:
        pytest.importorskip("zstandard")
    model, optimizer = trained()
    folder, (write, has_options) = tmp_path / "c", WRITERS[name]
    write(folder, model, optimizer)
    found = loaded(folder)
    assert same_tree(everything(*found), of_torch(model, optimizer))
    assert found[1].param_groups[0]["lr"] == (0.1 if has_options else 0.5)

    state = blank(state_of(model, optimizer, tensors_only=True))
    dcp.load(state, storage_reader=CheckedReader(folder, verify=False), no_dist=True)
    assert same_tree(state, state_of(model, optimizer, tensors_only=True))

    def ends(*args: str) -> str:
        result = CliRunner().invoke(app, [*args, "--no-verify"])
        assert result.exit_code == 0, result.output
        return result.output

    assert "written by 1 rank" in ends("inspect", str(folder))
    ends("export", str(folder), str(tmp_path / "average.safetensors"))
    ends("diff", str(folder), str(folder))
    refused = CliRunner().invoke(app, ["verify", str(folder)])
    assert refused.exit_code == 1
    assert "has no manifest.json" in refused.output
    consolidated = CliRunner().invoke(app, ["consolidate", str(folder), str(tmp_path / "all.pt"), "--no-verify"])
    assert (consolidated.exit_code == 0) == has_options


def test_what_torch_2_2_wrote_torch_reads_too(tmp_path: Path) -> None:
    """The sample is one: torch's reader takes it."""
    model, optimizer = trained()
    WRITERS["torch 2.2"][0](tmp_path / "c", model, optimizer)
    state = blank(state_of(model, optimizer))
    dcp.load(state, checkpoint_id=tmp_path / "c", no_dist=True)
    assert same_tree(state["model"], state_of(model, optimizer)["model"])


# --- metadata of each rank ----------------------------------------------------------------------------------


def saves_alone(rank: int, _world_size: int, kind: str, folder: str) -> list[Tensor]:
    """Job: each rank writes metadata of its own; then torch's reader and this package's agree."""
    model, optimizer = trained(kind)
    save({**state_of(model, optimizer), "rank": rank}, Path(folder), use_collectives=False)
    torch.distributed.barrier()
    wanted = everything(model, optimizer) if kind == "stage2" else of_torch(model, optimizer)
    for stage in (1, 2):
        assert same_tree(everything(*loaded(Path(folder), stage)), wanted)
    return wanted


@pytest.mark.parametrize("kind", ["plain", "fsdp2", "stage2"])
def test_metadata_of_each_rank_is_merged(kind: str, tmp_path: Path) -> None:
    """On as many ranks and on one; values that ranks have of their own come from the lowest."""
    folder = tmp_path / "c"
    wanted = run("gloo", 2, saves_alone, kind, str(folder))[0]
    assert not (folder / METADATA_NAME).exists()
    assert same_tree(everything(*loaded(folder)), wanted)
    assert OpenCheckpoint(folder, verify=False).values(["rank"]) == {"rank": 0}
    with pytest.raises(CheckpointError, match=r"has no manifest\.json.*verify=False"):
        OpenCheckpoint(folder)
    result = CliRunner().invoke(app, ["inspect", str(folder), "--no-verify"])
    assert result.exit_code == 0, result.output

    if kind != "plain":
        (folder / "__1.metadata").rename(tmp_path / "aside")
        with pytest.raises(CheckpointError, match=r"hold .* elements, its shape"):
            loaded(folder)
        (tmp_path / "aside").rename(folder / "__1.metadata")
    (folder / "__0.metadata").rename(folder / "__2.metadata")
    with pytest.raises(CheckpointError, match=r"__0\.metadata is missing, and __1\.metadata is there"):
        loaded(folder)


def loads_two_kinds(_rank: int, _world_size: int, folder: str) -> None:
    """Job: load what does not fit together."""
    loaded(Path(folder), 2)


def test_ranks_that_differ_are_named(tmp_path: Path) -> None:
    """A key that has another shape in each rank's metadata is an error on all ranks."""
    for rank in range(2):
        model = {"weight": torch.ones(3 + rank)}
        save({"model": model}, tmp_path / f"{rank}", no_dist=True)
        (tmp_path / f"{rank}" / METADATA_NAME).rename(tmp_path / f"__{rank}.metadata")
    for error in run_errors("gloo", 2, loads_two_kinds, str(tmp_path)):
        for text in ("model.weight", "[3]", "rank 0", "[4]", "rank 1", "use_collectives=False"):
            assert text in error.message


# --- compressed ---------------------------------------------------------------------------------------------


def compressed(tmp_path: Path, extension: Any) -> Path:
    """Save with an extension."""
    save(state_of(*trained()), tmp_path / "c", FileSystemWriter(tmp_path / "c", _extensions=[extension]), no_dist=True)
    return tmp_path / "c"


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the conversion that it names works."""
    pytest.importorskip("zstandard")
    folder = compressed(tmp_path, ZStandard())
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(CheckpointError, match=r"pip install 'dist_asgd\[zstd\]'.*dcp_to_torch_save"):
        loaded(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder, tmp_path / "all.pt")
        torch_save_to_dcp(tmp_path / "all.pt", tmp_path / "plain")
    found = loaded(tmp_path / "plain")
    assert same_tree(everything(*found), of_torch(*trained()))
    assert found[1].param_groups[0]["lr"] == 0.1


def test_other_extensions_are_named_with_a_conversion_that_works(tmp_path: Path) -> None:
    """What this package does not read the extension's own program converts."""
    folder = compressed(tmp_path, Flip())
    with pytest.raises(CheckpointError, match=r"'stream\.flip/1'.*_extension_registry.*dcp\.save and no extensions"):
        loaded(folder)
    registry = ExtensionRegistry()
    registry.register(Flip)
    state: dict[str, Any] = {}
    reader = FileSystemReader(folder, _extension_registry=registry)
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    save(state, tmp_path / "plain", no_dist=True)
    assert same_tree(everything(*loaded(tmp_path / "plain")), of_torch(*trained()))


def test_nothing_expands_beyond_what_the_metadata_says(tmp_path: Path) -> None:
    """Of a bomb no more is decompressed than its tensor, or any object, may have."""
    zstandard = pytest.importorskip("zstandard")
    folder = compressed(tmp_path, ZStandard())
    bomb = zstandard.compress(bytes(1 << 26))
    assert len(bomb) < 1 << 13
    with edited_metadata(folder) as metadata:
        index = index_of(metadata, "model.0.weight")
        info = metadata.storage_data[index]
        path = folder / info.relative_path
        metadata.storage_data[index] = replace(info, offset=path.stat().st_size, length=len(bomb))
        with path.open("ab") as file:
            file.write(bomb)
    with pytest.raises(CheckpointError, match=r"model\.0\.weight in .* expands to more than the 66016 bytes"):
        loaded(folder)
    with edited_metadata(folder) as metadata:
        entry: Any = metadata.state_dict_metadata["model.0.weight"]
        entry.size = entry.chunks[0].sizes = torch.Size([1 << 20, 1 << 20])
    with pytest.raises(CheckpointError, match=r"model\.0\.weight needs 4398046511104 bytes"):
        loaded(folder)


def test_damaged_frames_are_refused() -> None:
    """Whatever is changed in a compressed chunk; and a window of gigabytes is not allocated."""
    zstandard = pytest.importorskip("zstandard")
    data = zstandard.compress(b"0123456789" * 100)
    assert decompressed(data * 2, ["stream.zstd/1"], 2000, "it") == b"0123456789" * 200
    for damaged in (b"", data[: len(data) // 2], data + b"x", b"PK" + data):
        # A frame that is cut short at a block is only shorter: the archive in it has its own end.
        with contextlib.suppress(CheckpointError):
            assert len(decompressed(damaged, ["stream.zstd/1"], 1000, "it")) < 1000
    # A frame's header with a window of 2 GiB.
    with pytest.raises(CheckpointError, match="it is damaged"):
        decompressed(b"\x28\xb5\x2f\xfd\x00\xa8\x01\x00\x00", ["stream.zstd/1"], 1000, "it")


# --- safetensors --------------------------------------------------------------------------------------------


def saves_regions(_rank: int, _world_size: int, folder: str) -> list[Tensor]:
    """Job: FSDP2 saves regions as safetensors; stage 1 and 2 load them."""
    model, optimizer = trained("fsdp2")
    writer = HuggingFaceStorageWriter(folder, save_distributed=True)
    save(state_of(model, optimizer, tensors_only=True), Path(folder), writer)
    torch.distributed.barrier()
    for stage in (1, 2):
        assert same_tree(everything(*loaded(Path(folder), stage)), of_torch(model, optimizer))
    return of_torch(model, optimizer)


def test_regions_in_safetensors_files_are_put_together(tmp_path: Path) -> None:
    """On two ranks and on one."""
    wanted = run("gloo", 2, saves_regions, str(tmp_path))[0]
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert same_tree(everything(*loaded(tmp_path)), wanted)
    assert "written by 2 ranks" in CliRunner().invoke(app, ["inspect", str(tmp_path), "--no-verify"]).output
    next(tmp_path.glob("shard-00001*")).unlink()
    with pytest.raises(CheckpointError, match=r"hold .* elements, its shape"):
        loaded(tmp_path)


def test_values_that_are_no_tensors_have_damaged_it(tmp_path: Path) -> None:
    """``HuggingFaceStorageWriter`` writes them where the header should be."""
    save(state_of(*trained()), tmp_path, HuggingFaceStorageWriter(str(tmp_path)), no_dist=True)
    with pytest.raises(CheckpointError, match=r"values that are no tensors.*torch cannot read it either"):
        loaded(tmp_path)


def tensor_file(header: Any, data: bytes = bytes(8)) -> bytes:
    """Return a safetensors file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**changes: Any) -> dict[str, Any]:
    """Return the header of one tensor of two float32."""
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


HEADERS: dict[str, bytes] = {
    "nothing": b"",
    "a length of 2^60": (1 << 60).to_bytes(8, "little") + b"{}",
    "no JSON": tensor_file(b"{"),
    "a list": tensor_file([]),
    "deep": tensor_file(b"[" * 100_000),
    "a key twice": tensor_file(b'{"w":{},"w":{}}'),
    "an unknown dtype": tensor_file(entry(dtype="F7")),
    "a shape of 2^60": tensor_file(entry(shape=[1 << 60])),
    "a negative shape": tensor_file(entry(shape=[-2])),
    "a shape of bools": tensor_file(entry(shape=[True])),
    "more data than the file has": tensor_file(entry(shape=[4], data_offsets=[0, 16])),
    "data before the file": tensor_file(entry(data_offsets=[-8, 0])),
    "too little data": tensor_file(entry(data_offsets=[0, 4])),
    "offsets of other dimensions": tensor_file(
        {"__metadata__": {"DCP_SHARDING_INFO": '{"w": {"saved_offsets": [0, 0]}}'}, **entry()}
    ),
    "no offsets": tensor_file({"__metadata__": {"DCP_SHARDING_INFO": "{}"}, **entry()}),
    "offsets that are no JSON": tensor_file({"__metadata__": {"DCP_SHARDING_INFO": "["}, **entry()}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_are_not_trusted(name: str, tmp_path: Path) -> None:
    """Whatever is wrong with one is an error that names the file."""
    (tmp_path / "model.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no safetensors file as it should be"):
        read_all(tmp_path, verify=False)


def test_tensors_of_two_checkpoints_in_one_folder_are_named(tmp_path: Path) -> None:
    """Equal keys in two files are no regions of one tensor; overlapping data is refused."""
    (tmp_path / "a.safetensors").write_bytes(tensor_file(entry()))
    read_all(tmp_path, verify=False)
    (tmp_path / "b.safetensors").write_bytes(tensor_file(entry()))
    with pytest.raises(CheckpointError, match=r"w at .*another file.*several checkpoints"):
        read_all(tmp_path, verify=False)
    (tmp_path / "b.safetensors").write_bytes(tensor_file({**entry(), "v": entry()["w"]}))
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match="overlap"):
        read_all(tmp_path, verify=False)


# --- names that are not read --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("torch.distributed._shard.checkpoint.metadata", "torch 1.12 or earlier wrote it.*torch_save_to_dcp"),
        ("megatron.core.dist_checkpointing.mapping", "another program.*write it again with dcp.save"),
    ],
)
def test_the_error_says_who_wrote_it(module: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that no release since 1.13 writes."""
    made_up = types.ModuleType(module)
    kind = type("ShardedTensorStorageMetadata", (), {"__module__": module})
    setattr(made_up, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, module, made_up)
    words = module.split(".")
    for parent in (".".join(words[:end]) for end in range(1, len(words))):
        monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, types.ModuleType(parent)))
    data = pickle.dumps(Metadata({"weight": kind()}, None, {}))  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match=f"ShardedTensorStorageMetadata.*{text}"):
        parse(data, "here")
