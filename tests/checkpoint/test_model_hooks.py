"""Models whose ``state_dict()`` is not their parameters by name: their hooks rename, cast, split, fuse or drop them.

Everything that is exported, of a running job and of its checkpoint, is the average of each parameter whose averaging
has begun, or an error names the parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from typer.testing import CliRunner

from dist_asgd import ShardedASGD, export_averaged, save_checkpoint
from dist_asgd.cli import app
from tests.harness.bits import assert_same_bits
from tests.harness.ranks import run

RUNS = [("none", 1, "stage1"), ("gloo", 2, "stage1"), ("gloo", 2, "stage2"), ("gloo", 2, "fsdp2")]
Entries = dict[str, Any]
Averages = dict[str, Tensor]


class Net(nn.Module):
    """Three projections and a bias."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        for name in "qkv":
            layer = nn.Linear(4, 6, bias=name == "q")
            for p in layer.parameters():
                p.data.copy_(torch.randn(p.shape, generator=draw))
            setattr(self, name, layer.to(dtype))


def give_gradients(model: nn.Module, step: int) -> None:
    """The same on every rank, so that means are exact."""
    params = [p for p in model.parameters() if p.requires_grad]
    for number, p in enumerate(params):
        drawn = torch.randint(-64, 65, p.shape, generator=torch.Generator().manual_seed(100 * step + number)) / 256
        whole = drawn.to(p.dtype)
        if isinstance(p, DTensor):
            whole = torch.distributed.tensor.distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
        p.grad = whole


def build(mode: str, model: nn.Module, params: Any = None) -> ShardedASGD:
    """The optimizer of ``model`` after four steps, with averages. Collective."""
    if mode == "fsdp2":
        fully_shard(model)
        params = None
    params = model.named_parameters() if params is None else params
    stage = 2 if mode == "stage2" else 1
    optimizer = ShardedASGD(params, lr=0.2, t0=0, stage=stage, bucket_cap_mb=0.0001)
    train(model, optimizer)
    return optimizer


def train(model: nn.Module, optimizer: ShardedASGD) -> None:
    """Take four steps. Collective."""
    for step in range(4):
        optimizer.zero_grad()
        give_gradients(model, step)
        optimizer.step()


def offline(folder: str, *options: str) -> Any:
    """The result of ``dist-asgd export``."""
    arguments = ["export", f"{folder}/c", f"{folder}/offline.safetensors", "--force", *options]
    return CliRunner().invoke(app, arguments)


# --- hooks ---------------------------------------------------------------------------------------------------


def cast(state: Entries) -> None:
    state.update({key: value.to(torch.bfloat16) for key, value in state.items()})


def widen(state: Entries) -> None:
    state.update({key: value.detach().to(torch.float64) for key, value in state.items()})


def twice(state: Entries) -> None:
    state.update({key: value.to(torch.float16).to(torch.float32) for key, value in state.items()})


def copied(state: Entries) -> None:
    state.update({key: torch.empty_like(value).copy_(value) for key, value in state.items()})


def rename(state: Entries) -> None:
    state["attention.query"] = state.pop("q.weight")


def swap(state: Entries) -> None:
    state["q.weight"], state["k.weight"] = state["k.weight"], state["q.weight"]


def fuse(state: Entries) -> None:
    state["qkv"] = torch.cat([state.pop(f"{name}.weight") for name in "qkv"])


def scale(state: Entries) -> None:
    state["q.weight"] = state["q.weight"] * 2


def split(state: Entries) -> None:
    state["upper"], state["lower"] = state.pop("q.weight").chunk(2)


def in_place(state: Entries) -> None:
    state["v.weight"] = state["v.weight"].clone().mul_(-1)


def transpose(state: Entries) -> None:
    state["v.weight"] = state["v.weight"].t()


def drop(state: Entries) -> None:
    del state["k.weight"]


def keep(state: Entries) -> None:
    state["k.weight"] = torch.zeros(6, 4)


def untraced(state: Entries) -> None:
    if not isinstance(state["k.weight"], DTensor):
        state["k.weight"] = torch.tensor(state["k.weight"].tolist())
    else:
        drop(state)


# A hook, whether the command line can know the averages, and whether the running job can.
HOOKS: dict[str, tuple[Callable[[Entries], None], bool, bool]] = {
    "cast": (cast, True, True),
    "widen": (widen, True, True),
    "twice": (twice, False, True),
    "copied": (copied, True, True),
    "rename": (rename, True, True),
    "swap": (swap, True, True),
    "fuse": (fuse, False, True),
    "scale": (scale, False, True),
    "split": (split, True, True),
    "in place": (in_place, False, True),
    "transpose": (transpose, True, True),
    "drop": (drop, False, False),
    "keep": (keep, False, False),
    "untraced": (untraced, False, False),
}


def exports(rank: int, _world_size: int, mode: str, what: str, dtype: torch.dtype, folder: str) -> None:
    """Job: export live, save, and export the checkpoint."""
    hook, known_offline, known = HOOKS[what]
    model = Net(dtype)
    optimizer = build(mode, model)
    whole = optimizer.consolidated_state_dict(to=None)["state"]
    expected = {name: whole[i]["ax"] for i, (name, _) in enumerate(model.named_parameters())}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if what in ("fuse", "scale", "in place", "twice"):
        # Computed entries are computed from averages in the parameters' dtype.
        expected = {name: value.to(dtype) for name, value in expected.items()}
    hook(expected)
    handle = model.register_state_dict_post_hook(lambda _, state, *__: hook(state))
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    save_checkpoint(f"{folder}/c", model, optimizer, step=4)
    path = f"{folder}/live.safetensors"
    if known:
        export_averaged(path, model, optimizer)
        found = load_file(path)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_same_bits(found[name], value.to(dtypes[name]).contiguous(), name)
    else:
        with pytest.raises(ValueError, match=r"\(k.weight\), and model.state_dict\(\) has no entry"):
            export_averaged(path, model, optimizer)
        assert not Path(path).exists()
    handle.remove()
    for name, value in model.state_dict().items():
        local, other = (t.to_local() if isinstance(t, DTensor) else t for t in (value, before[name]))
        assert_same_bits(local, other, name)
    if rank == 0:
        # A view of a DTensor is on several ranks, and its place in the whole is not recorded.
        known_offline = known_offline and not (mode == "fsdp2" and what in ("split", "transpose"))
        result = offline(folder)
        assert (result.exit_code == 0) == known_offline, result.output
        if known_offline:
            found = load_file(f"{folder}/offline.safetensors")
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert_same_bits(found[name], value.to(dtypes[name]).contiguous(), name)
        else:
            assert ".weight" in result.stderr
            assert "--last" in result.stderr
            assert offline(folder, "--last").exit_code == 0
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


@pytest.mark.parametrize(("backend", "world_size", "mode"), RUNS)
@pytest.mark.parametrize("what", HOOKS)
def test_hooks_see_averages(backend: str, world_size: int, mode: str, what: str, tmp_path: Path) -> None:
    """Whatever hooks make of parameters is made of their averages, or an error names those that would be left out."""
    run(backend, world_size, exports, mode, what, torch.float32, str(tmp_path))


@pytest.mark.parametrize("what", ["cast", "widen", "copied", "rename", "fuse", "split", "scale"])
def test_hooks_of_16_bit_parameters(what: str, tmp_path: Path) -> None:
    """A cast to something wider is that of the float32 average."""
    run("none", 1, exports, "stage1", what, torch.bfloat16, str(tmp_path))


def test_computed_entries_are_not_widened(tmp_path: Path) -> None:
    """They are computed in bfloat16: the file would claim more than it has."""
    model = Net(torch.bfloat16)
    optimizer = build("stage1", model)
    model.register_state_dict_post_hook(lambda _, state, *__: fuse(state))
    with pytest.raises(ValueError, match=r"cannot export qkv as torch\.float32: a state_dict hook"):
        export_averaged(tmp_path / "a.safetensors", model, optimizer, torch.float32)
    export_averaged(tmp_path / "a.safetensors", model, optimizer, torch.bfloat16)


def fails_on_one(rank: int, world_size: int, folder: str) -> None:
    """Job: a hook that refuses while the averages are in place, on the last rank alone."""
    model = Net()
    optimizer = build("stage2", model)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def hook(_: nn.Module, state: Entries, *__: Any) -> None:
        if rank == world_size - 1 and optimizer.averages.is_swapped:
            raise RuntimeError("no room")
        fuse(state)

    handle = model.register_state_dict_post_hook(hook)
    with pytest.raises(Exception, match="no room"):
        export_averaged(f"{folder}/a.safetensors", model, optimizer)
    handle.remove()
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name], name)
    export_averaged(f"{folder}/a.safetensors", model, optimizer)


def test_a_hook_that_fails_leaves_everything(tmp_path: Path) -> None:
    """The error comes on all ranks, the parameters are back, and the next export works."""
    run("gloo", 2, fails_on_one, str(tmp_path))
