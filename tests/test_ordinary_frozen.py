"""Frozen parameters among trained ones: nothing is held or sent for them until they are trained."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from dist_asgd import ShardedASGD, export_averaged, load_checkpoint, save_checkpoint
from tests.harness.bits import assert_same_bits
from tests.harness.meshes import Net as Blocks
from tests.harness.meshes import batch, hybrid_mesh
from tests.harness.ranks import run, run_errors
from tests.test_ordinary_subclasses import Boxed

both = pytest.mark.parametrize("stage", [1, 2])
forms = pytest.mark.parametrize("form", [{}, {"foreach": True}, {"foreach": False}], ids=["fused", "foreach", "loop"])
worlds = pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
Form = dict[str, Any]
OPTIONS: dict[str, Any] = {"lr": 0.1, "lambd": 0.01, "t0": 0, "weight_decay": 0.1}


def lora(seed: int = 0) -> nn.ParameterDict:
    """Large weights that are frozen, with small trained ones between them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"base.0": (32, 16), "a.0": (3, 16), "base.1": (8, 32), "a.1": (5,), "base.2": (7, 3)}
    params = {name.replace(".", "_"): nn.Parameter(torch.randn(s, generator=generator)) for name, s in shapes.items()}
    for name, param in params.items():
        param.requires_grad_("base" not in name)
    return nn.ParameterDict(list(params.items()))  # of a dict it would sort the names


def step(optimizer: torch.optim.Optimizer, params: list[Tensor], number: int) -> None:
    """One step after a backward with the same dyadic gradients on every rank, for all that requires one."""
    optimizer.zero_grad()
    loss = torch.zeros(())
    for index, param in enumerate(params):
        if param.requires_grad:
            generator = torch.Generator().manual_seed(100 * number + index)
            loss = loss + (param * torch.randint(-8, 9, param.shape, generator=generator) / 16).sum()
    loss.backward()
    optimizer.step()


def assert_like_torch(ours: ShardedASGD, params: list[Tensor], oracle: torch.optim.Optimizer) -> None:
    """All parameters have the oracle's bits, and so has the state, with the same entries."""
    theirs = [param for group in oracle.param_groups for param in group["params"]]
    for index, (mine, wanted) in enumerate(zip(params, theirs, strict=True)):
        assert_same_bits(mine.detach(), wanted.detach(), f"parameter {index}")
    found, wanted_state = ours.consolidated_state_dict(to=None), oracle.state_dict()
    assert found["state"].keys() == wanted_state["state"].keys()
    for index, entry in wanted_state["state"].items():
        for key, value in entry.items():
            assert_same_bits(found["state"][index][key], value, f"{key} of parameter {index}")


def unfrozen_in_time(_rank: int, world_size: int, stage: int, form: Form) -> None:
    """Job: frozen parameters cost nothing; then they are unfrozen one by one, and one is frozen again."""
    net, plain = lora(), lora()
    params, theirs = list(net.values()), list(plain.values())
    addresses = {name: param.data_ptr() for name, param in net.items()}
    ours = ShardedASGD(params, **OPTIONS, stage=stage, **form)
    oracle = torch.optim.ASGD(theirs, **OPTIONS, foreach=form.get("foreach", False))
    for number in range(2):
        step(ours, params, number)
        step(oracle, theirs, number)
    assert_like_torch(ours, params, oracle)
    trained = [p for p in params if p.requires_grad]
    assert list(ours.state) == trained
    # One bucket with two slots of 64 bytes and more, and not 86 kB.
    assert ours.memory_report().state_bytes * world_size <= 4 * sum(p.numel() for p in trained) + 64 * 4
    for name, param in net.items():
        assert (param.data_ptr() == addresses[name]) == (not param.requires_grad)
    ours.state[params[1]]["own"] = "kept"
    shown = ours.state[params[1]]["ax"]
    for number, name in enumerate(["base_1", "base_0", "base_2"], 2):
        net[name].requires_grad_(True)
        plain[name].requires_grad_(True)
        if name == "base_2":
            net["base_0"].requires_grad_(False)
            plain["base_0"].requires_grad_(False)
        step(ours, params, number)
        step(oracle, theirs, number)
        assert_like_torch(ours, params, oracle)
    assert ours.state[params[1]]["own"] == "kept"
    assert ours.state[params[1]]["ax"] is shown
    with ours.averaged_parameters():
        assert_same_bits(params[2].detach(), oracle.state[theirs[2]]["ax"], "average")


@both
@forms
@worlds
def test_frozen_until_they_are_trained(backend: str, world_size: int, stage: int, form: Form) -> None:
    """State for what is trained only; each one that is unfrozen goes on as with torch, and the others stay."""
    run(backend, world_size, unfrozen_in_time, stage, form)


def gradient_of_a_frozen_one(_rank: int, _world_size: int, stage: int) -> None:
    """Job: torch steps whatever has a gradient, whether it requires one or not; also after an edit of the groups."""
    for edited in (False, True):
        net, plain = lora(), lora()
        params, theirs = list(net.values()), list(plain.values())
        ours, oracle = ShardedASGD(params, **OPTIONS, stage=stage), torch.optim.ASGD(theirs, **OPTIONS, foreach=False)
        step(ours, params, 0)
        step(oracle, theirs, 0)
        for optimizer, own in ((ours, params), (oracle, theirs)):
            optimizer.zero_grad()
            own[0].grad = torch.full_like(own[0], 0.5)
            if edited:
                optimizer.param_groups[0]["params"].reverse()
            optimizer.step()
        assert_same_bits(params[0].detach(), theirs[0].detach(), "parameter")
        if not edited:
            assert_like_torch(ours, params, oracle)


@both
@worlds
def test_a_gradient_that_was_set_on_a_frozen_parameter(backend: str, world_size: int, stage: int) -> None:
    """The parameter is updated."""
    run(backend, world_size, gradient_of_a_frozen_one, stage)


def anything(_rank: int, _world_size: int, stage: int) -> None:
    """Job: frozen tensors that could not be sharded."""
    shared = torch.ones(4).share_memory_()
    memory = torch.ones(8)
    frozen = [
        torch.ones(4, device="meta"),
        torch.ones(4, dtype=torch.int8),
        torch.eye(3).to_sparse(),
        torch.ones(1).expand(3),
        shared,
        memory[:6],
        memory[2:],
        torch.ones(3, dtype=torch.bool),
        Boxed(torch.ones(4)),
        torch.ones(2, dtype=torch.float8_e4m3fn),
    ]
    params = [nn.Parameter(value, requires_grad=False) for value in frozen]
    plain = nn.Parameter(torch.ones(4))
    # The device of the others does not matter for the kernel.
    optimizer = ShardedASGD([*params, plain], lr=0.1, stage=stage, fused=True)
    for number in range(2):
        step(optimizer, [plain], number)
        params[1].data = params[1].data.float()
    assert list(optimizer.state_dict()["state"]) == [len(params)]
    assert params[4].data_ptr() == shared.data_ptr()
    assert optimizer.param_groups[0]["params"][3] is params[3]
    optimizer.load_state_dict(optimizer.consolidated_state_dict(to=None))
    del optimizer.param_groups[0]["params"][0]
    optimizer.step()
    # Moved meanwhile: it is taken in as it is now.
    params[1].data = params[1].data.double()
    params[1].requires_grad_(True)
    step(optimizer, [params[1]], 5)
    assert optimizer.state[params[1]]["ax"].dtype == torch.float64


def test_frozen_parameters_of_a_differentiable_optimizer() -> None:
    """Nothing is sharded in this mode, and the state is torch's own."""
    trained, frozen = (torch.ones(n, requires_grad=n == 3) for n in (3, 2))
    optimizer = ShardedASGD([frozen, trained], lr=0.1, differentiable=True)
    assert list(optimizer.state) == [trained]
    optimizer.load_state_dict(optimizer.state_dict())
    assert list(optimizer.state_dict()["state"]) == [1]
    optimizer.start_averaging()
    frozen.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[frozen]["step"] == 1
    assert frozen[0].item() == pytest.approx(0.9, abs=1e-3)


@both
@worlds
def test_frozen_parameters_may_be_anything(backend: str, world_size: int, stage: int) -> None:
    """They are left where they are."""
    run(backend, world_size, anything, stage)


def unfrozen_on_one(rank: int, _world_size: int, stage: int, ranks: tuple[int, ...]) -> None:
    """Job: not all ranks unfreeze the same."""
    net = lora()
    optimizer = ShardedASGD(net.items(), **OPTIONS, stage=stage)
    step(optimizer, list(net.values()), 0)
    net["base_2" if rank == 0 else "base_1"].requires_grad_(rank in ranks)
    optimizer.step()


@both
@pytest.mark.parametrize(("ranks", "named"), [((0,), ["base_2", "rank 0", "rank 1"]), ((0, 1), ["base_2", "base_1"])])
def test_ranks_that_unfreeze_others_are_an_error(stage: int, ranks: tuple[int, ...], named: list[str]) -> None:
    """On all ranks, with the name."""
    for error in run_errors("gloo", 2, unfrozen_on_one, stage, ranks):
        assert all(word in error.message for word in named), error.message
        assert "on every rank" in error.message


def cannot_be_taken_in(rank: int, _world_size: int, stage: int) -> list[str]:
    """Job: what is unfrozen cannot be sharded on one rank; once it can, the optimizer goes on."""
    net = lora()
    params = list(net.values())
    optimizer = ShardedASGD(net.items(), **OPTIONS, stage=stage)
    step(optimizer, params, 0)
    before = [param.detach().clone() for param in params]
    if rank == 0:
        net["base_1"].data = net["base_1"].data.share_memory_()
    net["base_1"].requires_grad_(True)
    errors = []
    for _ in range(2):
        with pytest.raises(ValueError, match="memory that other processes share") as caught:
            step(optimizer, params, 1)
        errors.append(str(caught.value))
    assert all(torch.equal(param, value) for param, value in zip(params, before, strict=True))
    assert net["base_1"] not in optimizer.state
    if rank == 0:
        net["base_1"].data = net["base_1"].data.clone()
    step(optimizer, params, 1)
    assert "ax" in optimizer.state[net["base_1"]]
    return errors


@both
def test_what_cannot_be_taken_in_is_an_error_on_all_ranks(stage: int) -> None:
    """Nothing has changed then."""
    for errors in run("gloo", 2, cannot_be_taken_in, stage):
        assert all("base_1" in error and "[on rank 0 of 2]" in error for error in errors)


def other_values(rank: int, _world_size: int, stage: int, later: bool) -> None:
    """Job: a frozen parameter has other values on one rank, at the start or when it is unfrozen."""
    net = lora()
    optimizer = ShardedASGD(net.items(), **OPTIONS, stage=stage)
    if later:
        step(optimizer, list(net.values()), 0)
        net["base_1"].requires_grad_(True)
    with torch.no_grad():
        net["base_1"].view(-1)[3] += rank
    step(optimizer, list(net.values()), 1)


@both
@pytest.mark.parametrize("later", [False, True])
def test_other_values_on_a_rank_are_an_error(stage: int, later: bool) -> None:
    """At the first step after it, on all ranks."""
    for error in run_errors("gloo", 2, other_values, stage, later):
        assert "base_1 does not start from the same values" in error.message


def not_averaged(rank: int, _world_size: int) -> None:
    """Job: gradients of an unfrozen parameter differ, as DDP leaves out what was frozen when it was constructed."""
    net = lora()
    optimizer = ShardedASGD(net.items(), **OPTIONS)
    step(optimizer, list(net.values()), 0)
    net["base_1"].requires_grad_(True)
    optimizer.zero_grad()
    net["base_1"].grad = torch.full_like(net["base_1"], float(rank))
    optimizer.step()


def test_gradients_of_unfrozen_parameters_are_compared_in_stage_1() -> None:
    """The error says what DDP does."""
    for error in run_errors("gloo", 2, not_averaged):
        assert "base_1" in error.message
        assert "frozen when it was constructed" in error.message


def loaded_while_frozen(_rank: int, _world_size: int, stage: int) -> None:
    """Job: a state dict of torch's has state for a parameter that is frozen here, and another one has none."""
    net, plain = lora(), lora()
    params, theirs = list(net.values()), list(plain.values())
    oracle = torch.optim.ASGD(theirs, **OPTIONS, foreach=False)
    plain["base_1"].requires_grad_(True)
    step(oracle, theirs, 0)
    plain["base_1"].requires_grad_(False)
    with torch.no_grad():
        for mine, theirs_one in zip(params, theirs, strict=True):
            mine.copy_(theirs_one)
    ours = ShardedASGD(params, **OPTIONS, stage=stage)
    saved = copy.deepcopy(oracle.state_dict())
    bad = copy.deepcopy(saved)
    bad["state"][2]["ax"] = torch.zeros(3)
    with pytest.raises(ValueError, match="has shape"):
        ours.load_state_dict(bad)
    assert net["base_1"] not in ours.state
    ours.load_state_dict(saved)
    assert_like_torch(ours, params, oracle)
    for one in (net, plain):
        one["base_1"].requires_grad_(True)
    step(ours, params, 1)
    step(oracle, theirs, 1)
    assert_like_torch(ours, params, oracle)


@both
@worlds
def test_loaded_state_of_a_frozen_parameter_is_kept(backend: str, world_size: int, stage: int) -> None:
    """As in torch; a dict that does not fit changes nothing."""
    run(backend, world_size, loaded_while_frozen, stage)


class Net(nn.Module):
    """A model with the parameters of ``lora``, in bfloat16 if masters are kept."""

    def __init__(self, seed: int, half: bool) -> None:
        super().__init__()
        self.all = lora(seed).bfloat16() if half else lora(seed)


def checkpoints(_rank: int, _world_size: int, stage: int, folder: Path, half: bool) -> None:
    """Job: saved with a parameter that is trained and loaded with it frozen, and the other way round."""
    options = {**OPTIONS, "stage": stage, "master_weights": half}
    first = Net(1, half)
    first.all["base_1"].requires_grad_(True)
    params = list(first.all.values())
    optimizer = ShardedASGD(params, **options)
    step(optimizer, params, 0)
    save_checkpoint(folder / "a", first, optimizer, step=1)
    second = Net(2, half)
    others = list(second.all.values())
    again = ShardedASGD(others, **options)
    load_checkpoint(folder / "a", second, again)
    for mine, wanted in zip(others, params, strict=True):
        assert_same_bits(mine.detach(), wanted.detach(), "loaded")
    assert sorted(again.state_dict()["state"]) == [1, 2, 3]
    first.all["base_1"].requires_grad_(False)
    for number in range(1, 3):
        step(optimizer, params, number)
        step(again, others, number)
    found, wanted_state = again.consolidated_state_dict(None), optimizer.consolidated_state_dict(None)
    assert found["state"].keys() == wanted_state["state"].keys()
    for index, entry in wanted_state["state"].items():
        for key, value in entry.items():
            assert_same_bits(found["state"][index][key], value, f"{key} of parameter {index}")
    # Saved while it is frozen, and loaded while it is trained: it starts anew.
    third = Net(3, half)
    frozen = ShardedASGD(list(third.all.values()), **options)
    step(frozen, list(third.all.values()), 0)
    save_checkpoint(folder / "b", third, frozen, step=1)
    load_checkpoint(folder / "b", first, optimizer)
    assert 2 not in optimizer.consolidated_state_dict(None)["state"]
    first.all["base_0"].requires_grad_(True)
    load_checkpoint(folder / "b", first, optimizer)
    for mine, wanted in zip(params, third.all.values(), strict=True):
        assert_same_bits(mine.detach(), wanted.detach(), "loaded")
    export_averaged(folder / "c.safetensors", third, frozen)
    frozen.start_averaging()


@both
@worlds
@pytest.mark.parametrize("half", [False, True], ids=["float32", "masters"])
def test_checkpoints_of_frozen_and_trained(
    backend: str, world_size: int, stage: int, half: bool, tmp_path: Path
) -> None:
    """State goes with the checkpoint, weights of frozen parameters are saved and loaded."""
    run(backend, world_size, checkpoints, stage, tmp_path, half)


def interrupted(_rank: int, _world_size: int) -> None:
    """Job: a signal comes while an unfrozen parameter is taken in."""
    net = lora()
    params = list(net.values())
    optimizer = ShardedASGD(params, **OPTIONS)
    step(optimizer, params, 0)
    net["base_1"].requires_grad_(True)
    real = optimizer.shards.take_in

    def take_in(indices: Any) -> None:
        real(indices)
        raise KeyboardInterrupt

    optimizer.shards.take_in = take_in  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        step(optimizer, params, 1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="frozen parameters became trained ones was interrupted"):
            step(optimizer, params, 1)


def test_an_interruption_is_said_by_the_next_call() -> None:
    """Shards are incomplete then."""
    run("none", 1, interrupted)


def dtensors(_rank: int, world_size: int, stage: int, placement: Placement) -> None:
    """Job: frozen DTensors beside plain trained parameters; one is unfrozen."""
    mesh = init_device_mesh("cpu", (world_size,))
    whole = [torch.arange(12.0).view(6, 2), torch.arange(8.0).view(4, 2), torch.ones(5)]
    params: list[Tensor] = [
        nn.Parameter(distribute_tensor(value, mesh, [placement]), requires_grad=False) for value in whole[:2]
    ]
    params.append(nn.Parameter(whole[2].clone()))
    theirs = [nn.Parameter(value.clone(), param.requires_grad) for value, param in zip(whole, params, strict=True)]
    ours = ShardedASGD(params, **OPTIONS, stage=stage)
    oracle = torch.optim.ASGD(theirs, **OPTIONS, foreach=False)
    for number in range(4):
        if number == 2:
            for some in (params, theirs):
                some[1].requires_grad_(True)
        for optimizer, some in ((ours, params), (oracle, theirs)):
            optimizer.zero_grad()
            for param in some:
                if param.requires_grad:
                    gradient = torch.full(param.shape, 0.5 + number)
                    sharded = isinstance(param, DTensor)
                    param.grad = distribute_tensor(gradient, mesh, [placement]) if sharded else gradient
            optimizer.step()
        assert (params[1] in ours.state) == (number >= 2)
        assert params[0] not in ours.state
    for mine, wanted in zip(params, theirs, strict=True):
        found = mine.full_tensor() if isinstance(mine, DTensor) else mine
        assert_same_bits(found.detach(), wanted.detach(), "parameter")


@both
@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=["sharded", "replicated"])
def test_frozen_dtensors(stage: int, placement: Placement) -> None:
    """They have no state until they are trained; replicas share it then."""
    run("gloo", 2, dtensors, stage, placement)


def accumulated(_rank: int, world_size: int, hybrid: bool) -> None:
    """Job: a parameter is unfrozen between two backwards of one step, and clipped; then one that is frozen is kept."""
    net, plain = lora(), lora()
    params, theirs = list(net.values()), list(plain.values())
    mesh = hybrid_mesh((2, world_size // 2)) if hybrid else None
    ours = ShardedASGD(params, **OPTIONS, stage=2, mesh=mesh)
    oracle = torch.optim.ASGD(theirs, **OPTIONS, foreach=False)
    for number in range(3):
        for optimizer, some in ((ours, params), (oracle, theirs)):
            optimizer.zero_grad()
            for part in range(2):
                some[2].requires_grad_(number > 0 or part > 0)
                trained = [param for param in some if param.requires_grad]
                torch.stack([(param * (part + 0.5)).sum() for param in trained]).sum().backward()
            if number == 0 and optimizer is ours:
                # The factor is 1, and the call takes the parameter in.
                ours.clip_grad_norm_(1e9)
            optimizer.step()
        assert_like_torch(ours, params, oracle)
    for optimizer, some in ((ours, params), (oracle, theirs)):
        optimizer.zero_grad()
        some[2].requires_grad_(False)
        optimizer.param_groups[0]["params"].reverse()
        some[1].sum().backward()
        optimizer.step()
    assert_like_torch(ours, params[::-1], oracle)


@pytest.mark.parametrize(("world_size", "hybrid"), [(2, False), (4, True)], ids=["group", "hybrid"])
def test_unfrozen_while_gradients_accumulate(world_size: int, hybrid: bool) -> None:
    """Its first gradient is reduced like one set by hand; state goes through an edit while it is frozen again."""
    run("gloo", world_size, accumulated, hybrid)


def fsdp1(rank: int, _world_size: int, stage: int) -> None:
    """Job: one frozen module of FSDP1, beside torch on a twin."""
    models = []
    for _ in range(2):
        model = Blocks()
        model.blocks[0].requires_grad_(False)
        for position, block in enumerate(model.blocks):
            model.blocks[position] = Fsdp(block, use_orig_params=True, device_id=torch.device("cpu"))
        models.append(Fsdp(model, use_orig_params=True, device_id=torch.device("cpu")))
    subject = ShardedASGD(models[0].parameters(), **OPTIONS, stage=stage)
    oracle = torch.optim.ASGD(models[1].parameters(), **OPTIONS, foreach=False)
    for number in range(3):
        for module, optimizer in zip(models, (subject, oracle), strict=True):
            optimizer.zero_grad()
            module(batch(number, rank)).square().mean().backward()
            optimizer.step()
    for mine, wanted in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_same_bits(mine.detach(), wanted.detach(), "parameter")
        assert (mine in subject.state) == mine.requires_grad
    saved = Fsdp.optim_state_dict(models[0], subject)
    again = ShardedASGD(models[0].parameters(), **OPTIONS, stage=stage)
    again.load_state_dict(Fsdp.optim_state_dict_to_load(models[0], again, saved))
    for param in subject.state:
        assert_same_bits(again.state[param]["ax"], subject.state[param]["ax"], "average")


@both
@pytest.mark.filterwarnings("ignore")
def test_frozen_modules_of_fsdp1(stage: int) -> None:
    """They have no state."""
    run("gloo", 2, fsdp1, stage)
