"""``dist_asgd.plan``: what can be planned, at which size, what is chosen, and what is refused."""

from __future__ import annotations

import json
import math
import re
import time
import tracemalloc
from dataclasses import FrozenInstanceError, asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import dist_asgd
from dist_asgd import ShardedASGD, plan
from dist_asgd.planning.choice import FSDP2, HSDP, HYBRID1, HYBRID2, STAGE1, STAGE2, UNSHARDED
from dist_asgd.planning.sources import shapes_of
from tests.harness.models import odd_net

LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}
LLAMA_70B = {
    **LLAMA_7B,
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}
LLAMA_405B = {
    **LLAMA_70B,
    "hidden_size": 16384,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "intermediate_size": 53248,
}
TWO_LAYERS = {**LLAMA_7B, "num_hidden_layers": 2}
GIB = 1 << 30


# --- sources -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "elements", "params"),
    [(LLAMA_7B, 6_738_415_616, 291), (LLAMA_70B, 70_553_706_496, 723), (LLAMA_405B, 405_853_388_800, 1137)],
)
def test_configurations_have_the_published_sizes(config: dict[str, Any], elements: int, params: int) -> None:
    """The numbers of elements that the models' own pages give."""
    found = shapes_of(config)
    assert sum(param.numel for param in found.params) == elements
    assert len(found.trained) == params


def test_all_sources_of_one_model_agree(tmp_path: Path) -> None:
    """A module, its parameters, a safetensors file, an index with its files and a folder."""
    model = nn.Sequential(nn.Linear(31, 65), nn.LayerNorm(65), nn.Linear(65, 3))
    expected = plan(model, ranks=4).rows
    state = {name: param.detach() for name, param in model.named_parameters()}
    save_file(state, tmp_path / "model.safetensors")
    split = tmp_path / "split"
    split.mkdir()
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(state)}
    for file in set(names.values()):
        save_file({name: tensor for name, tensor in state.items() if names[name] == file}, split / file)
    (split / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    sources = [
        model.parameters(),
        model.named_parameters(),
        [{"params": list(model.parameters()), "lr": 0.1}],
        str(tmp_path / "model.safetensors"),
        split / "model.safetensors.index.json",
        split,
    ]
    for source in sources:
        found = plan(source, ranks=4).rows
        by_mode = {row.mode: row.total_bytes for row in found}
        # Names give blocks to FSDP2, which a list of parameters has not; files do not tell the order of registration.
        for row in expected:
            if row.mode not in (FSDP2, HSDP):
                assert by_mode[row.mode] == pytest.approx(row.total_bytes, rel=0.02), source


def test_tied_and_frozen_parameters_count_once_and_without_state() -> None:
    """A tied weight is one parameter; a frozen one and a buffer lie on every rank."""
    model = odd_net()
    model.register_buffer("mean", torch.zeros(1000, dtype=torch.float64))
    row = plan(model, ranks=1).row(UNSHARDED)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert row.bytes.parameters == row.bytes.average == row.bytes.gradients == trained
    assert row.bytes.unmanaged == 7 * 4 + 8000


def test_an_index_without_its_files_is_planned_by_its_size(tmp_path: Path) -> None:
    """And the plan says so."""
    index = {
        "metadata": {"total_size": 2_000_000, "total_parameters": 1_000_000},
        "weight_map": {"a": "gone.safetensors"},
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = plan(tmp_path, ranks=2)
    assert found.num_elements == 1_000_000
    assert found.rows[0].precision == "bfloat16"
    assert any("gone.safetensors" in assumption for assumption in found.assumptions)


def test_a_number_is_planned_as_itself() -> None:
    """As an int, and as people write it."""
    assert plan("0.1B", ranks=8).as_dict()["rows"] == plan(100_000_000, ranks=8).as_dict()["rows"]
    row = plan(100_000_007, ranks=8).row(FSDP2)
    assert row.bytes.average == pytest.approx(4 * 100_000_007 / 8, rel=0.01)


# --- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_a_plan_for_a_backend_with_contiguous_buffers_agrees(stage: int) -> None:
    """On 1,024 ranks of torch's ``fake`` group, which takes messages as NCCL does."""
    shapes = [(700, 300), (300,), (1,), (64, 64, 3), (), (129,)] * 3
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    row = plan([nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes], ranks=1024, fused=True).row(
        f"stage {stage}"
    )
    dist.init_process_group("fake", rank=0, world_size=1024, store=FakeStore())
    try:
        optimizer = ShardedASGD(params, stage=stage)
        scratch = optimizer.memory_report().in_flight_bytes
        sum((param * 1.0).sum() for param in params).backward()
        report = optimizer.memory_report()
        del optimizer
    finally:
        dist.destroy_process_group()
    assert (row.bytes.parameters, row.bytes.padding) == (report.parameter_bytes, report.padding_bytes)
    assert row.bytes.average == report.state_bytes
    assert row.bytes.gradients == report.gradient_bytes
    # The scratch memory of a CPU kernel, which a GPU does not have.
    assert row.bytes.buffers == report.in_flight_bytes - scratch


def test_the_largest_models_take_seconds() -> None:
    """405B on 16,384 ranks, in three precisions."""
    started = time.perf_counter()
    found = plan(LLAMA_405B, ranks=16384, gpu_memory="80GiB", dtype=torch.bfloat16)
    assert time.perf_counter() - started < 30
    assert {row.mode for row in found.rows} == {UNSHARDED, STAGE1, HYBRID1, STAGE2, HYBRID2, FSDP2, HSDP}
    assert found.recommended == FSDP2


def test_nothing_is_made_for_each_rank() -> None:
    """A few MiB, on 8 ranks and on 16,384."""
    peaks = []
    for ranks in (8, 8, 16384):  # the first time modules are imported
        tracemalloc.start()
        plan(TWO_LAYERS, ranks=ranks, dtype=torch.bfloat16)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 4 << 20
    assert peaks[2] < 2 * peaks[1]


def test_nothing_of_the_world_is_touched() -> None:
    """No process group is made, and a module keeps its memory."""
    model = nn.Linear(300, 300)
    before = [(param.data_ptr(), param._version) for param in model.parameters()]
    plan(model, ranks=64)
    assert [(param.data_ptr(), param._version) for param in model.parameters()] == before
    assert all(param.grad is None for param in model.parameters())
    assert not dist.is_initialized()
    ShardedASGD(model.parameters()).step()


def test_dtypes_and_views_cost_what_they_hold() -> None:
    """Averages of 16-bit parameters are float32; masters of bfloat16 take 2 bytes, of float16 4."""

    def bytes_of(**options: Any) -> Any:
        return plan(TWO_LAYERS, ranks=64, **options).row(STAGE1).bytes

    numel = sum(param.numel for param in shapes_of(TWO_LAYERS).params)
    plain, half = (
        bytes_of(dtype=torch.bfloat16, master_weights=True),
        bytes_of(dtype=torch.float16, master_weights=True),
    )
    assert plain.parameters == pytest.approx(2 * numel, rel=0.001)
    assert plain.average == pytest.approx(4 * numel / 64, rel=0.001)
    assert plain.masters == pytest.approx(2 * numel / 64, rel=0.001)
    assert half.masters == 2 * plain.masters
    narrow = bytes_of(dtype=torch.bfloat16, average_dtype=torch.bfloat16)
    assert narrow.average == pytest.approx(plain.average / 2)
    assert bytes_of(gradient_as_bucket_view=False).passing == bytes_of().gradients
    assert {row.precision for row in plan(TWO_LAYERS, ranks=2).others} == {"bfloat16", "bfloat16, masters"}


# --- the mode to take --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "options", "mode"),
    [
        (LLAMA_7B, {"ranks": 8, "dtype": torch.bfloat16, "gpu_memory": "40GiB"}, STAGE2),
        (LLAMA_7B, {"ranks": 8, "gpu_memory": "40GiB"}, STAGE2),
        (LLAMA_7B, {"ranks": 64, "backend": "gloo"}, HYBRID2),
        (LLAMA_7B, {"ranks": 65536}, HYBRID2),
        (LLAMA_7B, {"ranks": 16}, STAGE2),
        (LLAMA_70B, {"ranks": 64, "dtype": torch.bfloat16, "gpu_memory": "80GiB"}, FSDP2),
        (LLAMA_70B, {"ranks": 64, "dtype": torch.bfloat16, "gpu_memory": "80GiB", "backend": "gloo"}, FSDP2),
        (LLAMA_7B, {"ranks": 16384, "dtype": torch.bfloat16, "gpu_memory": "10GiB"}, HSDP),
        (LLAMA_7B, {"ranks": 2, "gpu_memory": "20GiB"}, None),
        (LLAMA_7B, {"ranks": 1}, STAGE1),
        (LLAMA_7B, {"ranks": 1, "gpu_memory": "16GiB"}, None),
    ],
)
def test_the_mode_to_take(config: dict[str, Any], options: dict[str, Any], mode: str | None) -> None:
    """The mode that fits and sends the least; a reason with figures."""
    found = plan(config, **options)
    assert found.recommended == mode
    assert "GiB" in found.why
    if mode is not None and "gpu_memory" in options:
        assert found.row(mode).total_bytes <= int(options["gpu_memory"][:2]) * GIB
        assert found.row(mode).fits
    if mode is None:
        assert not any(row.fits for row in found.rows)
        fits_on = int(re.search(r"fits on ([\d,]+) ranks", found.why)[1].replace(",", ""))  # type: ignore[index]
        fewer, enough = (plan(config, **{**options, "ranks": n}).row(FSDP2).fits for n in (fits_on // 2, fits_on))
        assert (fewer, enough) == (False, True)


def test_a_mode_that_fills_the_memory_is_tight() -> None:
    """It is not taken while another one leaves room."""
    options: dict[str, Any] = {"ranks": 8, "dtype": torch.bfloat16}
    config = {**LLAMA_7B, "num_hidden_layers": 12, "vocab_size": 1000}
    need = plan(config, **options).row(STAGE2).total_bytes
    tight = plan(config, gpu_memory=need, **options)
    assert (tight.row(STAGE2).fits, tight.row(STAGE2).is_tight, tight.recommended) == (True, True, FSDP2)
    assert any(line.startswith(STAGE2) and line.endswith("tight") for line in str(tight).splitlines())
    roomy = plan(config, gpu_memory=round(need * 1.05), **options)
    assert (roomy.row(STAGE2).fits, roomy.row(STAGE2).is_tight, roomy.recommended) == (True, False, STAGE2)


def test_activations_count() -> None:
    """They can make a mode too large."""
    options: dict[str, Any] = {"ranks": 8, "dtype": torch.bfloat16, "gpu_memory": "40GiB"}
    plain = plan(LLAMA_7B, **options)
    more = plan(LLAMA_7B, activations="30GiB", **options)
    assert more.row(STAGE2).total_bytes == plain.row(STAGE2).total_bytes + 30 * GIB
    assert plain.row(STAGE2).fits
    assert not more.row(STAGE2).fits


# --- the result --------------------------------------------------------------------------------------------------


def test_a_plan_is_frozen_and_reads_as_a_table() -> None:
    """Each mode is a line; JSON has every figure."""
    found = plan(TWO_LAYERS, ranks=16, gpu_memory="80GiB")
    with pytest.raises(FrozenInstanceError):
        found.ranks = 2  # type: ignore[misc]
    text = str(found)
    for row in found.rows:
        assert any(line.startswith(row.mode) for line in text.splitlines())
    assert f"Take {found.recommended} (*): {found.why[:20]}" in text
    assert json.loads(json.dumps(found.as_dict()))["rows"][0]["bytes"] == asdict(found.rows[0].bytes)
    with pytest.raises(KeyError, match=r"it has torch\.optim\.ASGD, stage 1"):
        found.row("stage 3")


def test_the_function_stays_a_function() -> None:
    """A module of the same name would take its place once it is imported."""
    for name in ("cli", "planning.planner", "update.plan"):
        import_module(f"dist_asgd.{name}")
    assert dist_asgd.plan is plan


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (0, {}, "wanted a positive number"),
        (-7, {}, "wanted a positive number"),
        ("-7B", {}, "wanted a positive number"),
        ("7..B", {}, "is no number of parameters"),
        ("no/such.safetensors", {}, "does not exist"),
        (2.5, {}, "wanted a module"),
        (True, {}, "wanted a module"),
        (torch.ones(3), {}, "wanted a module"),
        ([], {}, "has no parameters"),
        (nn.ReLU(), {}, "has no parameters"),
        (nn.Linear(2, 2).requires_grad_(False), {}, "no parameter to train"),
        ([3], {}, "wanted a parameter"),
        ({"model_type": "gpt2"}, {}, "on the meta device"),
        ({"hidden_size": 8}, {}, "lacks num_hidden_layers"),
        ({**LLAMA_7B, "vocab_size": -1}, {}, "vocab_size must be a positive whole number"),
        ({**LLAMA_7B, "hidden_size": 100}, {}, "Give head_dim"),
        ({**LLAMA_7B, "dtype": "int8"}, {}, "cannot be trained"),
        (7, {"ranks": 0}, "ranks (the number of GPUs) must be"),
        (7, {"ranks": True}, "ranks (the number of GPUs) must be"),
        (7, {"ranks": 12, "ranks_per_node": 8}, "take one of 1, 2, 3, 4, 6, 12"),
        (7, {"ranks_per_node": 0}, "ranks_per_node must be"),
        (7, {"ranks": 8, "mesh": (3, 2)}, "mesh=3x2 has 6 ranks, and there are 8"),
        (7, {"ranks": 8, "mesh": (0, 8)}, "the number of replicas must be"),
        (7, {"ranks": 8, "mesh": 8}, "mesh must be two numbers"),
        (10**16, {}, "at most 1,000,000,000,000,000"),
        ("1e30", {}, "at most 1,000,000,000,000,000"),
        ({**LLAMA_7B, "vocab_size": 10**30}, {}, "Is the size right?"),
        (7, {"ranks": 10**9}, "at most 1,048,576 ranks"),
        (7, {"gpu_memory": "80"}, "with a unit such as 80GiB"),
        (7, {"gpu_memory": "80G"}, "80GiB or 80GB"),
        (7, {"gpu_memory": 0}, "80GiB or 80GB"),
        (7, {"activations": -1}, "activations must be"),
        (7, {"dtype": torch.int8}, "dtype must be None"),
        (7, {"dtype": "bfloat16"}, "dtype must be None"),
        (7, {"master_weights": True}, "convert the model first"),
        (7, {"average_dtype": torch.int8}, "average_dtype must be None"),
        (7, {"bucket_cap_mb": 0}, "bucket_cap_mb must be a positive"),
        (7, {"backend": "mpi"}, "backend must be nccl or gloo"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_said(model: Any, options: dict[str, Any], text: str) -> None:
    """Each error says what was wanted."""
    with pytest.raises(ValueError, match=r"^dist_asgd: ") as raised:
        plan(model, **{"ranks": 2, **options})
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("model.safetensors", b"", "does not begin with a header's length"),
        ("model.safetensors", (1 << 40).to_bytes(8, "little"), "does not begin with a header's length"),
        ("model.safetensors", (100).to_bytes(8, "little") + b"{}", "cut off"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"[]", "cut off or no JSON"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"{}", "has no parameters"),
        ("model.safetensors", b"\x25" + bytes(7) + b'{"a":{"dtype":"F8_E4M3","shape":[2]}}', "cannot be trained"),
        ("model.safetensors", b"\x0b" + bytes(7) + b'{"a": true}', "has no shape"),
        ("model.safetensors.index.json", b"{}", "has no weight_map"),
        ("model.safetensors.index.json", b'{"weight_map": {}}', "has no weight_map"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}', "no metadata.total_size"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../b.safetensors"}}', "beside the index"),
        ("config.json", b"{", "is no JSON"),
        ("config.json", b"[]", "wanted an object"),
        ("config.json", b"{}", "lacks hidden_size"),
        ("weights.bin", b"", "none of the files"),
    ],
    ids=str,
)
def test_files_that_cannot_be_read_are_said(name: str, content: bytes, text: str, tmp_path: Path) -> None:
    """Each error names the file."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"^dist_asgd: ") as raised:
        plan(tmp_path / name, ranks=2)
    assert text in str(raised.value)
    assert name in str(raised.value)


def test_folders_without_a_model_are_said(tmp_path: Path) -> None:
    """And folders with several."""
    with pytest.raises(ValueError, match=r"no config\.json"):
        plan(tmp_path, ranks=2)
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"weight": torch.ones(2)}, tmp_path / name)
    with pytest.raises(ValueError, match="2 files"):
        plan(tmp_path, ranks=2)
    for name in ("a.safetensors.index.json", "b.safetensors.index.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="several models"):
        plan(tmp_path, ranks=2)


@pytest.mark.parametrize("mesh", [(1, 8), (8, 1), (2, 4)])
@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_any_mesh_will_do(mesh: tuple[int, int], backend: str) -> None:
    """One replica is no mesh, and one shard is no sharding."""
    found = plan(TWO_LAYERS, ranks=8, mesh=mesh, backend=backend)
    flat, on_mesh = found.row(STAGE2).bytes, found.row(HYBRID2).bytes
    assert on_mesh.average == pytest.approx(flat.average * mesh[0], rel=0.01)
    assert found.recommended in (STAGE2, HYBRID2)


@pytest.mark.parametrize("ranks", [3, 7, 12, 96])
def test_any_number_of_ranks_will_do(ranks: int) -> None:
    """Shards are equal, and no smaller than their share."""
    found = plan(TWO_LAYERS, ranks=ranks)
    share = math.ceil(found.num_elements / ranks) * 4
    assert share <= found.row(STAGE2).bytes.average < 1.001 * share
    assert (HYBRID2 in {row.mode for row in found.rows}) == (ranks == 96)
    if ranks == 12:
        assert any("do not divide 12" in assumption for assumption in found.assumptions)
