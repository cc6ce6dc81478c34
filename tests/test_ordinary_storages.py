"""Parameters and published state have storages of their own, of exactly their bytes, as savers and copies expect."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from dist_asgd import ShardedASGD
from dist_asgd.storage.published import own_storage
from tests.harness.bits import assert_same_bits
from tests.harness.ranks import run, run_errors

WORLDS = [("none", 1), ("gloo", 2)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)
both = pytest.mark.parametrize("stage", [1, 2])
OPTIONS: dict[str, Any] = {"lr": 0.1, "t0": 1}
FORMS: dict[str, dict[str, Any]] = {"fused": {"fused": True}, "foreach": {"foreach": True}, "forloop": {"fused": False}}


def parameters() -> dict[str, nn.Parameter]:
    """Parameters of every dtype and of unusual shapes and strides; some share a bucket."""
    torch.manual_seed(0)
    kinds = {
        "weight": torch.randn(7, 5),
        "bias": torch.randn(7),
        "row": torch.randn(1, 6, 1),
        "scalar": torch.randn(()),
        "empty": torch.randn(0, 3),
        "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "double": torch.randn(5, dtype=torch.float64),
        "bf16": torch.randn(9).bfloat16(),
        "bf16_too": torch.randn(3).bfloat16(),
        "half": torch.randn(9).half(),
        "complex": torch.randn(4, dtype=torch.complex64),
    }
    params = {name: nn.Parameter(value) for name, value in kinds.items()}
    params["frozen"] = nn.Parameter(torch.randn(11), requires_grad=False)
    return params


def step(optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], seed: int) -> None:
    """Step with the same gradients on every rank."""
    optimizer.zero_grad()
    for index, p in enumerate(params.values()):
        generator = torch.Generator().manual_seed(31 * seed + index)
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) if p.requires_grad else None
    optimizer.step()


def saved_bytes(value: Any) -> int:
    """How many bytes ``torch.save`` writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.tell()


def own_bytes(_rank: int, _world_size: int, stage: int, form: str) -> None:
    """Job: every parameter and every published ``ax`` is like a tensor that was made alone, and is updated."""
    params, plain = parameters(), parameters()
    optimizer = ShardedASGD(params.items(), **OPTIONS, stage=stage, average_dtype=torch.float32, **FORMS[form])
    oracle = torch.optim.ASGD(plain.values(), **OPTIONS, foreach=form == "foreach")
    held = dict(params) | {f"ax of {n}": optimizer.state[p]["ax"] for n, p in params.items() if n != "frozen"}
    for seed in range(3):
        step(optimizer, params, seed)
        step(oracle, plain, seed)
    for name, tensor in held.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
        assert tensor.storage_offset() == 0, name
        alone = tensor.detach().clone()
        assert len(pickle.dumps(tensor.detach())) <= len(pickle.dumps(alone)) + 64, name
        assert copy.deepcopy(tensor).untyped_storage().nbytes() == tensor.nbytes, name
    addresses = [tensor.untyped_storage().data_ptr() for tensor in held.values() if tensor.numel()]
    assert len(set(addresses)) == len(addresses)
    for name, p in plain.items():
        if p.dtype in (torch.float32, torch.float64, torch.complex64):
            assert_same_bits(params[name], p, name)
            assert params[name].stride() == p.stride()
    # The state dict's tensors too, which a trainer saves one by one.
    for entry in optimizer.state_dict()["state"].values():
        assert saved_bytes(entry["ax"]) <= entry["ax"].nbytes + 4096


@worlds
@both
@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_has_a_storage_of_its_bytes(backend: str, world_size: int, stage: int, form: str) -> None:
    """In every implementation: storages are told apart, and parameters are updated through them."""
    run(backend, world_size, own_bytes, stage, form)


class Net(nn.Module):
    """Some layers of which one has its weights tied, as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight


@both
def test_savers_of_modules_write_what_they_write_of_a_plain_model(stage: int, tmp_path: Path) -> None:
    """``save_model`` of safetensors goes by storages, and writes tied weights once; ``torch.save`` writes storages."""
    model, plain = Net(), Net()
    plain.load_state_dict(model.state_dict())
    optimizer = ShardedASGD(model.parameters(), **OPTIONS, stage=stage)
    save_model(model, str(tmp_path / "here"))
    save_model(plain, str(tmp_path / "plain"))
    here, wanted = load_file(tmp_path / "here"), load_file(tmp_path / "plain")
    assert here.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_same_bits(here[name], tensor, name)
    for part, other in ((model.norm, plain.norm), (model, plain)):
        assert saved_bytes(part.state_dict()) == saved_bytes(other.state_dict())
    assert len(optimizer.state) == 5


def tensors() -> dict[str, Tensor]:
    """Views of flat memory, as they are handed out."""
    flat, pairs = torch.arange(64.0), torch.arange(64, dtype=torch.float64)
    return {
        "dense": flat[16:32].as_strided((4, 4), (1, 4)),
        "sizes of 1": flat[16:20].as_strided((1, 4, 1), (77, 1, 5)),
        "0-dim": flat[16],
        "empty": flat[16:16].as_strided((0, 3), (3, 1)),
        "complex": torch.view_as_complex(pairs[16:20].view(-1, 2)),
        "whole": flat,
    }


@pytest.mark.parametrize("kind", tensors())
def test_own_storage_is_the_same_memory(kind: str) -> None:
    """Also of a tensor that fills its storage: whoever moves the result must not move the flat memory."""
    tensor = tensors()[kind]
    made = own_storage(tensor)
    assert (made.shape, made.stride(), made.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
    assert_same_bits(made, tensor, kind)
    assert made.untyped_storage().nbytes() == tensor.nbytes
    tensor += 1
    assert_same_bits(made, tensor, kind)
    before = tensor.data_ptr()
    made.share_memory_()
    assert tensor.data_ptr() == before


def a_shared_layer(rank: int, world_size: int, stage: int) -> None:
    """Job: on the last rank, one parameter is in shared memory."""
    params = {"first": nn.Parameter(torch.ones(3)), "second": nn.Parameter(torch.ones(5))}
    if rank == world_size - 1:
        params["second"].share_memory_()
    ShardedASGD(params.items(), stage=stage)


@worlds
@both
def test_parameters_in_shared_memory_are_refused(backend: str, world_size: int, stage: int) -> None:
    """On all ranks, as other processes would not see a step; the parameters stay where they are."""
    errors = run_errors(backend, world_size, a_shared_layer, stage)
    assert {error.type_name for error in errors} == {"ValueError"}
    for error in errors:
        assert "second" in error.message
        assert "p.data = p.data.clone()" in error.message


def test_the_remedies_for_shared_memory_work(tmp_path: Path) -> None:
    """A mapped file is refused too, a copy of it and a file that is mapped for reading alone are not."""
    mapped = nn.Parameter(torch.from_file(str(tmp_path / "mapped"), shared=True, size=8))
    address = mapped.data_ptr()
    optimizer = ShardedASGD([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="other processes share"):
        optimizer.add_param_group({"params": [mapped]})
    assert mapped.data_ptr() == address
    mapped.data = mapped.data.clone()
    optimizer.add_param_group({"params": [mapped]})
    torch.save({"weight": torch.ones(4096)}, tmp_path / "saved")
    loaded = torch.load(tmp_path / "saved", mmap=True)
    ShardedASGD([nn.Parameter(loaded["weight"])])
