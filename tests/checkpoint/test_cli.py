"""Tests the command line on checkpoints of one process, sharded optimizers, FSDP2 and tensor parallelism."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console as RichConsole
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from typer.testing import CliRunner, Result

from dist_asgd import ShardedASGD, export_averaged, save_checkpoint
from dist_asgd.cli import app
from tests.harness.bits import assert_same_bits, same_bits, same_tree
from tests.harness.checkpoints import Payload, edited_metadata, put_chunk, saved
from tests.harness.models import mlp, odd_net
from tests.harness.ranks import run
from tests.harness.topologies import OPTIONS, Run, build, whole_state

COMMANDS = ["inspect", "verify", "consolidate", "export", "average", "diff"]
Saved = tuple[Path, dict[str, Tensor]]


def write(rank: int, _world_size: int, topology: str, kind: str, flatten: bool, folder: str) -> dict[str, Tensor]:
    """Job: train, save, and export from the running job unless it is FSDP2 alone; returns the whole state."""
    live = build(topology, kind).train(5)
    if topology == "fsdp2":
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        model, optim = get_state_dict(live.model, live.optimizer, options=options)
        dcp.save({"model": model, "optim": optim}, checkpoint_id=f"{folder}/checkpoint")
    else:
        extra = {"epoch": 3, "rank": rank}
        save_checkpoint(f"{folder}/checkpoint", live.model, live.optimizer, step=5, extra=extra)
        export_averaged(f"{folder}/live.safetensors", live.model, live.optimizer)
    return whole_state(live)


def written(
    folder: Path, backend: str, world_size: int, topology: str, kind: str = "mlp", flatten: bool = True
) -> Saved:
    """Write a checkpoint; returns its path, and the whole state that was saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return folder / "checkpoint", run(backend, world_size, write, topology, kind, flatten, str(folder))[0]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A checkpoint of one process."""
    return written(tmp_path_factory.mktemp("one"), "none", 1, "single")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A checkpoint of two ranks in stage 2."""
    return written(tmp_path_factory.mktemp("two"), "gloo", 2, "stage2")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A checkpoint of three ranks, with tied, frozen, transposed, 0-dim, empty and unused parameters."""
    return written(tmp_path_factory.mktemp("odd"), "gloo", 3, "stage1", "odd")


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A checkpoint of FSDP2 on two ranks, without a manifest."""
    return written(tmp_path_factory.mktemp("fsdp2"), "gloo", 2, "fsdp2")


@pytest.fixture(scope="module")
def tp(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A checkpoint of tensor parallelism on three ranks, one of which has no row of a layer; norms are plain."""
    return written(tmp_path_factory.mktemp("tp"), "gloo", 3, "tp")


def cli(*args: object, status: int = 0) -> Result:
    """Run a command in this process, and check its exit status."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, f"{result.exit_code}: {result.output}"
    return result


def from_json(*args: object, status: int = 0) -> Any:
    """The document that a command prints with ``--json``."""
    return json.loads(cli(*args, "--json", status=status).stdout)


def one_line(result: Result) -> str:
    """The line that reports an error; there is no other line, and nothing on standard output."""
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in line
    return line


# --- inspect -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "num_ranks"), [("two", 2), ("tp", 3)])
def test_inspect_says_what_is_there(source: str, num_ranks: int, request: pytest.FixtureRequest) -> None:
    """``inspect`` prints names, shapes, dtypes, scalars, the step and the ranks, as text and as JSON."""
    path, state = request.getfixturevalue(source)
    found = from_json("inspect", path)
    assert (found["step"], found["num_ranks"], found["verified"]) == (5, num_ranks, True)
    model = mlp(width=8, depth=1)
    assert [p["name"] for p in found["parameters"]] == [name for name, _ in model.named_parameters()]
    for entry, (name, param) in zip(found["parameters"], model.named_parameters(), strict=True):
        assert tuple(entry["shape"]) == param.shape
        assert (entry["dtype"], entry["ax_dtype"], entry["bytes"]) == ("float32", "float32", param.nbytes)
        for key in ("step", "eta", "mu"):
            assert entry[key] == state[f"{key} of {name}"].item()
        assert (entry["averaging"], entry["t0"], entry["averaged_steps"]) == (True, 2, 2)
    assert found["num_elements"] == sum(p.numel() for p in model.parameters())
    assert [e["name"] for e in found["others"]] == ["seen"]
    assert [e["name"] for e in found["extra"]] == [str(rank) for rank in range(num_ranks)]
    text = cli("inspect", path).stdout
    for part in (
        f"step 5, written by {num_ranks} ranks",
        "1.up.weight",
        "16×8",
        "t0 2, average of 2 iterates",
        "also in the model: seen 2 float32",
    ):
        assert part in text


def test_inspect_says_once_what_is_equal_in_all_rows(two: Saved, odd: Saved) -> None:
    """Shared facts are on one line, so that a table fits 80 columns; a column whose rows differ stays."""
    text = cli("inspect", two[0]).stdout
    assert re.search(r"^all: float32, step 5, eta [0-9.]+, t0 2, average of 2 iterates$", text, re.MULTILINE)
    assert re.search(r"^parameter +shape +size$", text, re.MULTILINE)
    assert max(map(len, text.splitlines()[1:])) <= 80
    text = cli("inspect", odd[0]).stdout
    assert re.search(r"^all: float32, t0 2$", text, re.MULTILINE)
    assert re.search(r"^inner.weight .*5 .*average of 2 iterates$", text, re.MULTILINE)
    assert re.search(r"^unused .*0 .*averaging not begun$", text, re.MULTILINE)


def test_inspect_reads_no_tensor_data(one: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """``inspect`` reads only scalars and plain values, so that it is quick for a checkpoint of any size."""
    from dist_asgd.checkpoint.format.reader import OpenCheckpoint

    asked = []
    tensor = OpenCheckpoint.tensor

    def watched(self: OpenCheckpoint, index: Any, data: bytes) -> Tensor:
        asked.append(index.fqn)
        return tensor(self, index, data)

    monkeypatch.setattr(OpenCheckpoint, "tensor", watched)
    cli("inspect", one[0])
    assert asked
    assert not [key for key in asked if not key.endswith((".step", ".eta", ".mu"))]


def test_inspect_of_parameters_without_average(odd: Saved) -> None:
    """Unused and frozen parameters are listed without an average, in the order of the model."""
    found = {p["name"]: p for p in from_json("inspect", odd[0])["parameters"]}
    assert (found["unused"]["step"], found["unused"]["averaging"]) == (0, False)
    assert found["scale"]["shape"] == []
    in_order = [name for name, _ in odd_net().named_parameters(remove_duplicate=False)]
    assert list(found) == [name for name in in_order if name != "tied.weight"], "the order of the model"
    assert found["inner.weight"]["averaging"]
    text = cli("inspect", odd[0]).stdout
    assert re.search(r"unused .*averaging not begun", text)
    assert re.search(r"scale +scalar", text)


@pytest.mark.parametrize("flatten", [True, False])
def test_inspect_of_another_programs_checkpoint(tmp_path: Path, flatten: bool) -> None:
    """A checkpoint of FSDP2, flattened or not, has no manifest, so it needs ``--no-verify``."""
    path, _ = written(tmp_path, "gloo", 2, "fsdp2", flatten=flatten)
    assert "--no-verify" in one_line(cli("inspect", path, status=1))
    found = from_json("inspect", path, "--no-verify")
    assert (found["step"], found["num_ranks"], found["verified"]) == (None, 2, False)
    assert {p["num_chunks"] for p in found["parameters"]} == {2}
    assert all(p["step"] == 5 and p["averaging"] for p in found["parameters"])
    assert "step unknown (no manifest)" in cli("inspect", path, "--no-verify").stdout


def test_names_cannot_paint_the_terminal(one: Saved, tmp_path: Path) -> None:
    """Escape sequences and markup in names are printed as text and have no effect."""
    path = Path(shutil.copytree(one[0], tmp_path / "checkpoint"))
    name = "model.\x1b[31mred\x1b]0;title\x07[bold]"
    with edited_metadata(path) as metadata:
        metadata.state_dict_metadata[name] = metadata.state_dict_metadata.pop("model.seen")
        for index in [i for i in metadata.storage_data if i.fqn == "model.seen"]:
            new = dcp.metadata.MetadataIndex(name, index.offset)
            metadata.storage_data[new] = metadata.storage_data.pop(index)
    text = cli("inspect", path, "--no-verify").stdout
    assert "\x1b" not in text
    assert r"\x1b[31mred\x1b]0;title\x07[bold]" in text


# --- verify ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "num_files"), [("two", 4), ("tp", 5)])
def test_verify_says_good(source: str, num_files: int, request: pytest.FixtureRequest) -> None:
    """``verify`` reports a good checkpoint with exit status 0."""
    path, _ = request.getfixturevalue(source)
    assert "good" in cli("verify", path).stdout
    found = from_json("verify", path)
    assert found["ok"]
    assert found["files"] == num_files
    assert found["bytes"] == sum(p.stat().st_size for p in path.iterdir() if p.name != "manifest.json")


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", "chunks.index", ".metadata", "manifest.json"])
def test_verify_finds_damage(two: Saved, tmp_path: Path, name: str) -> None:
    """``verify`` names the damaged file, with exit status 1, as JSON too."""
    path = Path(shutil.copytree(two[0], tmp_path / "checkpoint"))
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 16
    (path / name).write_bytes(data)
    result = cli("verify", path, status=1)
    assert f"{path / name} is damaged" in result.stderr
    assert "good" not in result.stdout
    found = from_json("verify", path, status=1)
    assert not found["ok"]
    assert name in found["problems"][0]


def test_verify_says_all_that_is_wrong(two: Saved, tmp_path: Path) -> None:
    """``verify`` reports missing and truncated files in one run, and notes superfluous ones."""
    path = Path(shutil.copytree(two[0], tmp_path / "checkpoint"))
    (path / "__0_0.distcp").unlink()
    (path / "more").touch()
    with (path / "__1_0.distcp").open("r+b") as file:
        file.truncate(100)
    errors = cli("verify", path, status=1).stderr
    for part in ("__0_0.distcp is missing", "not in the manifest, and ignored: more", "it is truncated"):
        assert part in errors
    for wrong in (tmp_path / "nothing", path / "more"):
        assert one_line(cli("verify", wrong, status=1))


def test_verify_reads_hashes_of_chunks_too(two: Saved, tmp_path: Path) -> None:
    """A manifest with the chunks of another step fails on loading, so ``verify`` reports it."""
    from dataclasses import replace

    from dist_asgd.checkpoint.format.manifest import read_manifest, write_manifest
    from dist_asgd.checkpoint.format.reader import OpenCheckpoint

    path = Path(shutil.copytree(two[0], tmp_path / "checkpoint"))
    manifest, by_name = read_manifest(path), OpenCheckpoint(path).table().chunks()
    assert manifest is not None
    name, chunks = next(iter(by_name.items()))
    wrong = [replace(chunks[0], xxh3_128="0" * 32), *chunks[1:]]
    write_manifest(path, replace(manifest, chunks={**by_name, name: wrong}))
    assert "is damaged between bytes 0 and" in cli("verify", path, status=1).stderr
    write_manifest(path, replace(manifest, chunks={**by_name, name: chunks[1:]}))
    assert "has no hash for" in cli("verify", path, status=1).stderr
    write_manifest(path, replace(manifest, chunks=by_name))
    assert "good" in cli("verify", path).stdout


# --- consolidate -------------------------------------------------------------------------------------------


def consolidated(path: Path, out: Path, *options: str) -> dict[str, Any]:
    """The content of the ``.pt`` file, loaded as the help says."""
    cli("consolidate", path, out, *options)
    return torch.load(out)  # type: ignore[no-any-return]


@pytest.mark.parametrize("source", ["one", "two", "fsdp2", "tp"])
def test_consolidated_state_goes_on_in_torch(source: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """``torch.optim.ASGD`` loads the file and takes the next steps as the saved job would, to the bit."""
    path, state = request.getfixturevalue(source)
    whole = consolidated(path, tmp_path / "out.pt", *(["--no-verify"] if source == "fsdp2" else []))
    model = mlp(width=8, depth=1, seed=5)
    model.register_buffer("seen", torch.zeros(2))
    optimizer = torch.optim.ASGD(model.parameters(), lr=1.0)
    model.load_state_dict(whole["model"])
    optimizer.load_state_dict(whole["optim"])
    for name, value in whole_state(Run("single", model, optimizer, 5)).items():
        assert_same_bits(value, state[name], name)
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in OPTIONS} == OPTIONS
    again = build("single").train(5)
    assert same_tree(whole_state(Run("single", model, optimizer, 5).train(3)), whole_state(again.train(3))), (
        "continuation differs"
    )


def test_consolidated_state_is_that_of_the_optimizer(odd: Saved, tmp_path: Path) -> None:
    """The state is that of ``consolidated_state_dict()``; parameters that never stepped have no entry."""
    whole = consolidated(odd[0], tmp_path / "out.pt")
    live = build("single", "odd").train(5)
    expected = live.optimizer.consolidated_state_dict()  # type: ignore[operator]
    assert whole["optim"]["state"].keys() == expected["state"].keys()
    for index, entry in expected["state"].items():
        for key, value in entry.items():
            assert_same_bits(whole["optim"]["state"][index][key], value.contiguous(), f"{key} of {index}")
    (group,) = whole["optim"]["param_groups"]
    assert group["param_names"] == [name for name, _ in odd_net().named_parameters()]
    live.optimizer.load_state_dict(whole["optim"])


def test_groups_come_back(tmp_path: Path) -> None:
    """Parameters with equal hyperparameters make a group, in the order of the model; a Tensor lr stays a Tensor."""
    model = mlp(width=8, depth=1)
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "lr": torch.tensor(0.5), "weight_decay": 0.1}, {"params": others, "lr": 0.25}]
    optimizer = ShardedASGD(groups, t0=3)
    save_checkpoint(tmp_path / "checkpoint", model, optimizer, step=0)
    whole = consolidated(tmp_path / "checkpoint", tmp_path / "out.pt")
    first, second = whole["optim"]["param_groups"]
    assert (first["weight_decay"], second["lr"], first["t0"]) == (0.1, 0.25, 3)
    assert torch.equal(first["lr"], torch.tensor(0.5))
    names = [name for name, _ in model.named_parameters()]
    assert first["param_names"] == [n for n, p in model.named_parameters() if p.dim() > 1]
    assert second["params"] == list(range(len(weights), len(names)))
    assert whole["optim"]["state"] == {}
    optimizer.load_state_dict(whole["optim"])


def test_consolidate_to_safetensors(two: Saved, fsdp2: Saved, tmp_path: Path) -> None:
    """The file has the tensors under the checkpoint's keys, and the groups in its metadata."""
    for source, options in ((two, []), (fsdp2, ["--no-verify"])):
        out = tmp_path / "out.safetensors"
        cli("consolidate", source[0], out, "--force", *options)
        found = load_file(out)
        for name, value in source[1].items():
            key = name if name.startswith("model.") else "optim.state.{1}.{0}".format(*name.split(" of "))
            assert_same_bits(found.pop(key), value, key)
        assert not found
        with safe_open(out, "pt") as file:
            (group,) = json.loads(file.metadata()["param_groups"])
        assert {key: group[key] for key in OPTIONS} == OPTIONS


def test_consolidate_wants_an_optimizer(tmp_path: Path) -> None:
    """A checkpoint of a model alone cannot be consolidated, but it can be exported."""
    model = nn.Linear(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    result = cli("consolidate", tmp_path / "checkpoint", tmp_path / "out.pt", "--no-verify", status=1)
    assert "has no optimizer state" in one_line(result)
    result = cli("export", tmp_path / "checkpoint", tmp_path / "out.safetensors", "--no-verify")
    assert "note: the checkpoint has no averages: these are the last iterates." in result.stderr
    assert same_tree(load_file(tmp_path / "out.safetensors"), dict(model.state_dict()))


# --- export ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["one", "two", "odd", "tp"])
def test_export_is_what_the_job_would_export(source: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """``export`` writes the same bits as ``export_averaged`` of the running job, tied parameters included."""
    path, state = request.getfixturevalue(source)
    found = from_json("export", path, tmp_path / "out.safetensors")
    live = load_file(path.parent / "live.safetensors")
    assert same_tree(load_file(tmp_path / "out.safetensors"), live)
    averaged = {name for name in live if not same_bits(live[name], state[f"model.{name}"])}
    assert averaged
    assert found["tensors"] == len(live)
    assert found["averaged"] >= len(averaged)
    if source == "odd":
        assert same_bits(live["tied.weight"], live["inner.weight"])


def test_export_of_fsdp2_is_its_average(fsdp2: Saved, tmp_path: Path) -> None:
    """``export`` assembles tensors from the chunks of another program."""
    path, state = fsdp2
    cli("export", path, tmp_path / "out.safetensors", "--no-verify")
    for name, value in load_file(tmp_path / "out.safetensors").items():
        assert_same_bits(value, state.get(f"ax of {name}", state[f"model.{name}"]), name)


def test_export_options(two: Saved, tmp_path: Path) -> None:
    """``export`` writes the last iterate, another dtype, or several files on request."""
    path, state = two
    out = tmp_path / "model.safetensors"
    assert from_json("export", path, out, "--last")["averaged"] == 0
    for name, value in load_file(out).items():
        assert_same_bits(value, state[f"model.{name}"], name)
    cli("export", path, out, "--dtype", "bfloat16", "--force")
    for name, value in load_file(out).items():
        expected = state.get(f"ax of {name}")
        assert_same_bits(value, state["model.seen"] if expected is None else expected.bfloat16(), name)
    files = [Path(p).name for p in from_json("export", path, out, "--max-shard-gb", 1e-6, "--force")["files"]]
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [*files, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    whole: dict[str, Tensor] = {}
    for name in files:
        whole |= load_file(tmp_path / name)
    assert {name: whole[name].numel() for name in index["weight_map"]} == {n: t.numel() for n, t in whole.items()}
    assert same_tree(dict(sorted(whole.items())), dict(sorted(load_file(path.parent / "live.safetensors").items())))
    assert "exists" in one_line(cli("export", path, out, status=1)), "an index is in the way as well"
    assert cli("export", path, out, "--dtype", "int8", status=2)


# --- diff --------------------------------------------------------------------------------------------------


def test_diff_of_equal_checkpoints(two: Saved, tmp_path: Path) -> None:
    """Checkpoints of different numbers of ranks are equal, except for the user's values of each rank."""
    other, _ = written(tmp_path, "gloo", 3, "stage1")
    found = from_json("diff", two[0], other, status=1)
    assert [d["key"] for d in found["differences"]] == ["extra.2"]
    assert "0 of" in cli("diff", two[0], two[0]).stdout
    assert from_json("diff", other, other) == {"same": True, "differences": []}


def test_diff_says_what_differs(one: Saved, tmp_path: Path) -> None:
    """``diff`` prints how many elements differ and by how much, shapes, values and missing keys, with status 1 or 2."""
    run_ = build("single").train(5)
    with torch.no_grad():
        run_.model[0].weight[0, 3] += 0.5  # type: ignore[index, union-attr]
        run_.model[0].weight[1, 3] += 0.25  # type: ignore[index, union-attr]
    run_.model.register_buffer("new", torch.zeros(3))
    run_.model.register_buffer("seen", torch.zeros(3))
    run_.optimizer.param_groups[0]["lambd"] = 0.5
    save_checkpoint(tmp_path / "other", run_.model, run_.optimizer, step=5, extra={"epoch": 3, "rank": 0})
    differences = {d["key"]: d for d in from_json("diff", one[0], tmp_path / "other", status=1)["differences"]}
    weight = differences.pop("model.0.weight")
    assert (weight["what"], weight["num_different"]) == ("2 of 96 elements", 2)
    assert weight["max_abs"] == pytest.approx(0.5, abs=1e-6)
    assert differences.pop("model.new")["what"] == "only in the second"
    assert differences.pop("model.seen")["what"] == "[2] float32 and [3] float32"
    assert set(differences) == {f"optim.param_groups.{name}.lambd" for name, _ in run_.model.named_parameters()}
    assert all(d["what"] == "0.001 and 0.5" for d in differences.values())
    text = cli("diff", one[0], tmp_path / "other", status=1).stdout
    assert "2 of 96 elements" in text
    brief = [
        "only in the second: 1 key",
        "shape or dtype: 1 key",
        f"parameters: 1 of 10 differ, relative up to {weight['relative']:.3g} (0.weight)",
        "hyperparameters: 10 of 90 differ (lambd)",
    ]
    heads = [line for line in text.splitlines() if not line.startswith(" ")]
    lines = cli("diff", one[0], tmp_path / "other", "--brief", status=1).stdout.splitlines()
    assert heads == lines == [*brief, lines[-1]]
    assert re.search(r"^  lambd +0.001 and 0.5 +10 parameters$", text, re.MULTILINE)
    before, now = one[1]["model.0.weight"].double(), run_.model[0].weight.detach().double()  # type: ignore[index, union-attr]
    norm = max(before.norm(), now.norm()).item()
    assert weight["relative"] == pytest.approx((before - now).norm().item() / norm)
    assert one_line(cli("diff", one[0], tmp_path / "nothing", status=2))


def test_diff_takes_no_wrapper_for_a_difference(tmp_path: Path) -> None:
    """Neither in param_names nor in keys; another name and another order are differences."""
    model = mlp(width=8, depth=1)
    prefixes = {"plain": "", "ddp": "module.", "compiled": "_orig_mod.", "other": "encoder."}
    for kind, prefix in prefixes.items():
        named = [(f"{prefix}{name}", p) for name, p in model.named_parameters()]
        save_checkpoint(tmp_path / kind, model, ShardedASGD(named), step=0)
    for kind in ("ddp", "compiled"):
        assert from_json("diff", tmp_path / "plain", tmp_path / kind) == {"same": True, "differences": []}
    found = from_json("diff", tmp_path / "plain", tmp_path / "other", status=1)["differences"]
    assert {d["key"].rpartition(".")[2] for d in found} == {"param_names"}
    for kind, prefix in (("x", ""), ("y", "_orig_mod.")):
        state = {"model": {f"a.{prefix}weight": torch.ones(2)}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(state, checkpoint_id=tmp_path / kind, no_dist=True)
    assert from_json("diff", tmp_path / "x", tmp_path / "y", "--no-verify")["same"]


def test_diff_says_at_which_places_values_differ(tmp_path: Path) -> None:
    """Of nested values only what differs is printed, and scalars with both values."""
    model, optimizer = mlp(width=8, depth=1), None
    for step, extra in ((1, {"a": {"b": 1, "c": [1, 2]}}), (2, {"a": {"b": 1, "c": [1, 3]}, "d": None})):
        optimizer = optimizer or ShardedASGD(model.parameters())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        save_checkpoint(tmp_path / str(step), model, optimizer, step=step, extra=extra)
    text = cli("diff", tmp_path / "1", tmp_path / "2", status=1).stdout
    assert "extra.0: a.c.1: 2 and 3; d: nothing and None" in text
    assert re.search(r"^  step +1 and 2 +10 parameters$", text, re.MULTILINE)


def test_diff_is_to_the_bit(tmp_path: Path) -> None:
    """The sign of zero is a difference, equal NaNs are none, and infinity has no largest difference in JSON."""
    values = {"a": [0.0, 1.0], "b": [float("nan"), 1.0], "c": [1.0, 2.0]}
    changed = {"a": [-0.0, 1.0], "b": [float("nan"), 1.0], "c": [float("inf"), 2.0]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in (("one", values), ("two", changed)):
            state = {"model": {key: torch.tensor(value) for key, value in content.items()}}
            dcp.save(state, checkpoint_id=tmp_path / name, no_dist=True)
    found = from_json("diff", tmp_path / "one", tmp_path / "two", "--no-verify", status=1)["differences"]
    assert [(d["key"], d["num_different"]) for d in found] == [("model.a", 0), ("model.c", 1)]
    assert "sign of zeros" in found[0]["what"]
    assert found[1]["max_abs"] is None


# --- all commands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
@pytest.mark.parametrize("command", ["consolidate", "export"])
def test_nothing_is_overwritten_unasked(two: Saved, tmp_path: Path, command: str, name: str) -> None:
    """An existing file is replaced only with ``--force``, and no other file is left behind."""
    if command == "export" and name == "out.pt":
        assert "must end in .safetensors" in one_line(cli(command, two[0], tmp_path / name, status=1))
        return
    out = tmp_path / name
    out.write_text("precious")
    assert "exists" in one_line(cli(command, two[0], out, status=1))
    assert out.read_text() == "precious"
    cli(command, two[0], out, "--force")
    assert out.stat().st_size > 1000
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("out", ["none/out.safetensors", "folder.safetensors", "out.bin"])
@pytest.mark.parametrize("command", ["consolidate", "export"])
def test_where_nothing_can_be_written(two: Saved, tmp_path: Path, command: str, out: str) -> None:
    """A path that cannot be written is an error in one line, with exit status 1."""
    (tmp_path / "folder.safetensors").mkdir()
    line = one_line(cli(command, two[0], tmp_path / out, status=1))
    assert re.search(r"there is no directory|is a directory|must end in", line)


FILL = """
import resource, signal, sys
from dist_asgd.cli import app
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
saved, *outs = sys.argv[1:]
for out in outs:
    try:
        app(["consolidate", saved, out])
    except SystemExit as end:
        print(end.code)
"""


def test_a_full_disk_leaves_nothing(two: Saved, tmp_path: Path) -> None:
    """If the disk is full, each command reports it in one line and leaves no file behind."""
    done = python("-c", FILL, str(two[0]), *(str(tmp_path / out) for out in ("out.pt", "out.safetensors")))
    assert done.stdout.split() == ["1", "1"]
    assert all("File too large" in line for line in done.stderr.splitlines())
    assert len(done.stderr.splitlines()) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["inspect", "consolidate", "export", "average", "diff"])
def test_commands_run_nothing_and_load_no_damage(one: Saved, tmp_path: Path, command: str) -> None:
    """A payload in an object, or a flipped bit in a tensor, is an error; nothing is written or executed."""
    canary = tmp_path / "canary"
    hostile = Path(shutil.copytree(one[0], tmp_path / "hostile"))
    put_chunk(hostile, "optim.param_groups.0.weight.lr", saved(Payload(canary)))
    more = [] if command == "inspect" else [one[0] if command == "diff" else tmp_path / "out.safetensors"]
    status = 2 if command == "diff" else 1
    assert "holds more than tensors" in one_line(cli(command, hostile, *more, status=status))
    assert not canary.exists()
    damaged = Path(shutil.copytree(one[0], tmp_path / "damaged"))
    data = bytearray((damaged / "__0_0.distcp").read_bytes())
    for at in range(0, len(data), 64):
        data[at] ^= 1
    (damaged / "__0_0.distcp").write_bytes(data)
    assert "__0_0.distcp is damaged" in one_line(cli(command, damaged, *more, status=status))
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("command", ["", "plan", *COMMANDS])
def test_help_teaches(command: str) -> None:
    """The help of each command explains the command and its options."""
    text = cli(*([command] if command else []), "--help").stdout
    if not command:
        assert all(name in text for name in COMMANDS)
        return
    assert "--json" in text
    assert len(text.split()) > 60
    options = {
        "verify": "manifest.json",
        "consolidate": "--force",
        "export": "--last",
        "average": "--between",
        "diff": "Exit status",
        "inspect": "--no-verify",
        "plan": "--gpu-memory",
    }
    assert options[command] in text


def test_a_wrong_command_line_is_status_2(two: Saved) -> None:
    """A wrong command line ends with exit status 2."""
    for args in (["frobnicate"], ["inspect"], ["export", two[0]], ["inspect", two[0], "--force"]):
        cli(*args, status=2)
    assert "dist-asgd" in cli("--version").stdout


def python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python process in the folder of the repository."""
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), **environment}
    command = [sys.executable, "-W", "ignore", *args]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120)


def test_python_m_dist_asgd(two: Saved, tmp_path: Path) -> None:
    """``python -m dist_asgd`` runs the same commands, and draws a bar on a terminal."""
    out = str(tmp_path / "model.safetensors")
    done = python("-m", "dist_asgd", "export", str(two[0]), out, FORCE_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stdout
    assert "exporting" in done.stderr
    assert same_tree(load_file(out), load_file(two[0].parent / "live.safetensors"))


def test_the_console_script_is_the_same() -> None:
    """The console script in ``pyproject.toml`` is the same program, and its dependencies are declared."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, name = project["scripts"]["dist-asgd"].split(":")
    assert getattr(import_module(module), name) is import_module("dist_asgd.__main__".rpartition(".")[0] + ".cli").run
    for needed in ("typer", "rich", "safetensors", "xxhash"):
        assert any(entry.startswith(needed) for entry in project["dependencies"])


MEASURE = """
import json, resource, sys
from dist_asgd.cli import app
large, out = sys.argv[1:]
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
found = []
for command in ("export", "consolidate"):
    app([command, large + "-small", out, "--force"], standalone_mode=False)
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    app([command, large, out, "--force"], standalone_mode=False)
    found.append(peak() - before)
print(json.dumps(found))
"""


def test_memory_is_bounded_by_one_tensor(tmp_path: Path) -> None:
    """Of 48 tensors of 4 MB, one is in memory at a time, and the bytes it was read from."""
    for name, count, size in (("large", 24, 1024), ("large-small", 1, 8)):
        model = nn.ParameterList(nn.Parameter(torch.randn(size, 1024)) for _ in range(count))
        optimizer = ShardedASGD(model.parameters(), t0=0, foreach=False)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        save_checkpoint(tmp_path / name, model, optimizer, step=2)
    files = str(tmp_path / "large"), str(tmp_path / "o.safetensors")
    done = python("-c", MEASURE, *files, MALLOC_MMAP_THRESHOLD_="65536")
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout.splitlines()[-1])) < 2.5 * 4 * 1024 * 1024


@pytest.mark.parametrize("command", ["inspect", "verify", "diff"])
def test_an_output_that_cannot_be_written_is_said(one: Saved, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an exit status, and without a traceback."""
    from dist_asgd import console as module

    def full(*_: object, **options: object) -> None:
        if not options.get("err"):
            raise OSError(28, "No space left on device")
        echo(*_, **options)

    echo = module.typer.echo
    monkeypatch.setattr(module, "abandon_output", lambda: None)
    monkeypatch.setattr(module.typer, "echo", full)
    result = cli(command, one[0], *([one[0]] if command == "diff" else []), status=2 if command == "diff" else 1)
    assert "cannot write to standard output: No space left on device" in result.stderr


def test_a_narrow_terminal_has_blocks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Names stay whole, and every value has its header; a wide one has columns."""
    from dist_asgd import console as module

    name = "encoder.layers.11.self_attention.output_projection.weight"
    row = [name, "3\u00d74", "float32", "48 bytes", "float32", "12", "0.0123456", "0.25", "begun"]
    headers = ["parameter", "shape", "dtype", "size", "ax", "step", "eta", "mu", "averaging"]
    for width, lines in ((80, 3), (200, 2)):
        monkeypatch.setattr(module, "Console", partial(RichConsole, width=width, force_terminal=True))
        module.print_table(headers, [row])
        out = capsys.readouterr().out
        assert len(out.splitlines()) == lines
        assert name in out
        assert "0.0123456" in out
        assert all(len(line) <= width for line in out.splitlines())
