"""``param_groups``, parameters and process groups that change after the optimizer was constructed."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_asgd import ShardedASGD
from tests.harness.ranks import run, run_errors

both = pytest.mark.parametrize("stage", [1, 2])

# --- a process group that came later ------------------------------------------------------------------------


@both
@pytest.mark.parametrize("call", ["step", "clip_grad_norm_", "consolidated_state_dict"])
def test_a_default_group_that_was_made_after_the_optimizer(stage: int, call: str) -> None:
    """The first use raises: each rank would go on by itself."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = ShardedASGD([weight], stage=stage)
    weight.grad = torch.ones(3)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(RuntimeError, match="before init_process_group"):
            getattr(optimizer, call)(*([1.0] if call == "clip_grad_norm_" else []))
        assert weight.tolist() == [1.0] * 3
    finally:
        dist.destroy_process_group()


def test_a_default_group_of_one_rank_that_was_made_after_the_optimizer() -> None:
    """It changes nothing."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = ShardedASGD([weight], stage=2)
    weight.grad = torch.ones(3)
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        optimizer.step()
    finally:
        dist.destroy_process_group()
    assert weight[0] < 1.0


# --- parameters that change before the first step -----------------------------------------------------------

WORLDS = [("none", 1), ("gloo", 2)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)
CASES = [("none", 1, "forloop"), ("none", 1, "foreach"), ("gloo", 2, "fused")]
FORMS: dict[str, dict[str, Any]] = {"fused": {}, "foreach": {"foreach": True}, "forloop": {"fused": False}}


def make_model() -> nn.Sequential:
    """The same small model on every rank."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def set_gradients(params: Iterable[nn.Parameter], number: int) -> None:
    """Equal gradients on all ranks."""
    generator = torch.Generator().manual_seed(number)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)


def to_bfloat16(model: nn.Module, _: torch.optim.Optimizer) -> None:
    """Re-cast all parameters."""
    model.to(torch.bfloat16)


def to_double(model: nn.Module, _: torch.optim.Optimizer) -> None:
    """Re-cast some parameters."""
    model[2].double()  # type: ignore[index]


def replace_objects(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What trainers do for FSDP2: new Parameter objects in the module, and in the groups."""
    new = {}
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            new[param] = nn.Parameter(param.detach().clone())
            setattr(module, name, new[param])
    for group in optimizer.param_groups:
        group["params"] = [new[param] for param in group["params"]]


def share_memory(model: nn.Module, _: torch.optim.Optimizer) -> None:
    """Other memory, the same objects."""
    model.share_memory()


def resize(model: nn.Module, _: torch.optim.Optimizer) -> None:
    """Another shape under the same Parameter object, as lazy and pruned layers have it."""
    model[0].weight.data = torch.ones(3, 7)  # type: ignore[index]


CHANGES = {f.__name__: f for f in (to_bfloat16, to_double, replace_objects, share_memory, resize)}


def trained_after(_rank: int, _world_size: int, change: str, stage: int, form: str) -> list[list[float]]:
    """Job: build, change, and take three steps; checks against torch.optim.ASGD where that has the same dtypes."""
    results = []
    for cls, options in (
        (ShardedASGD, {"stage": stage, **FORMS[form]}),
        (torch.optim.ASGD, {"foreach": form == "foreach"}),
    ):
        model = make_model()
        optimizer = cls(model.parameters(), lr=0.1, t0=0, **options)  # type: ignore[operator]
        CHANGES[change](model, optimizer)
        for number in range(3):
            optimizer.zero_grad()
            set_gradients(model.parameters(), number)
            optimizer.step()
        results.append([p.detach().double().clone() for p in model.parameters()])
    tight = {"rtol": 0.0, "atol": 0.0}
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, **(tight if stage == 1 else {}))
    return [value.flatten().tolist() for value in results[0]]


@pytest.mark.parametrize(("backend", "world_size", "form"), CASES)
@both
@pytest.mark.parametrize("change", CHANGES)
def test_a_fresh_optimizer_takes_its_parameters_as_they_are(
    change: str, form: str, stage: int, backend: str, world_size: int
) -> None:
    """As torch does."""
    first, *others = run(backend, world_size, trained_after, change, stage, form)
    assert all(other == first for other in others)


def stage_2_after_a_backward(rank: int, world_size: int, change: str, form: str) -> list[list[float]]:
    """Job: backward comes before the change, or between the change and the first step; gradients differ by rank."""
    results = []
    for order in ("change, backward", "backward, change"):
        model = make_model()
        optimizer = ShardedASGD(model.parameters(), lr=0.1, t0=0, stage=2, **FORMS[form])
        for action in order.split(", "):
            if action == "change":
                CHANGES[change](model, optimizer)
            else:
                x = torch.full((2, 4), rank + 1.0, dtype=model[0].weight.dtype)
                (model[2](model[1](model[0](x)).to(model[2].weight.dtype)) * 1.0).square().sum().backward()
        optimizer.step()
        results.append([p.detach().double().flatten().tolist() for p in model.parameters()])
    wanted = make_model()
    CHANGES[change](wanted, torch.optim.ASGD(wanted.parameters()))
    reference = torch.optim.ASGD(wanted.parameters(), lr=0.1, t0=0)
    for other in range(world_size):
        x = torch.full((2, 4), other + 1.0, dtype=wanted[0].weight.dtype)
        out = wanted[2](wanted[1](wanted[0](x)).to(wanted[2].weight.dtype)).square().sum() / world_size
        out.backward()
    reference.step()
    values = [p.detach().double().flatten().tolist() for p in wanted.parameters()]
    tolerance = 2e-2 if model[0].weight.dtype == torch.bfloat16 else 1e-5
    for result in results:
        for ours, torchs in zip(result, values, strict=True):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(torchs), rtol=tolerance, atol=tolerance)
    return results[0]


@worlds
@pytest.mark.parametrize("change", ["to_bfloat16", "to_double", "share_memory"])
def test_stage_2_loses_no_gradient_in_a_change(change: str, backend: str, world_size: int) -> None:
    """Neither one that was reduced before the change, nor one that came after it."""
    first, *others = run(backend, world_size, stage_2_after_a_backward, change, "fused")
    assert all(other == first for other in others)


def fsdp2_after_construction(_rank: int, _world_size: int, stage: int) -> list[list[float]]:
    """Job: a trainer shards the model after the optimizer was built, and puts the new parameters into the groups."""
    model, plain = make_model(), make_model()
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=0, stage=stage)
    before = dict(model.named_parameters())
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    names = {id(param): name for name, param in before.items()}
    after = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [after[names[id(param)]] for param in group["params"]]
    reference = torch.optim.ASGD(plain.parameters(), lr=0.1, t0=0)
    for number in range(3):
        for one, opt in ((model, optimizer), (plain, reference)):
            opt.zero_grad()
            one(torch.full((2, 4), number + 1.0)).square().sum().backward()
            opt.step()
    assert optimizer.shards.presharded
    assert not optimizer.shards.buckets
    for ours, torchs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.full_tensor(), torchs.detach())  # type: ignore[attr-defined]
    return [p.full_tensor().flatten().tolist() for p in model.parameters()]  # type: ignore[attr-defined]


@both
def test_fsdp2_shards_the_model_after_the_optimizer_was_built(stage: int) -> None:
    """It trains, and has the state of DTensors."""
    first, second = run("gloo", 2, fsdp2_after_construction, stage)
    assert first == second


def changed_on_one_rank(rank: int, _world_size: int, change: str, stage: int) -> None:
    """Job: only rank 1 changes its parameters."""
    model = make_model()
    optimizer = ShardedASGD(model.named_parameters(), stage=stage)
    if rank == 1:
        CHANGES[change](model, optimizer)
    set_gradients(model.parameters(), 0)
    optimizer.step()


@both
@pytest.mark.parametrize("change", ["to_bfloat16", "replace_objects"])
def test_a_change_on_one_rank_only(change: str, stage: int) -> None:
    """All ranks say which parameter, and what happened to it where."""
    for error in run_errors("gloo", 2, changed_on_one_rank, change, stage):
        assert error.type_name == "CallsDiffer"
        assert "0.weight" in error.message
        assert "rank 1" in error.message


def changed_after_a_step(_rank: int, _world_size: int, change: str, stage: int) -> None:
    """Job: a used optimizer does not follow a conversion."""
    model = make_model()
    optimizer = ShardedASGD(model.named_parameters(), stage=stage)
    set_gradients(model.parameters(), 0)
    optimizer.step()
    CHANGES[change](model, optimizer)
    optimizer.zero_grad()
    set_gradients(model.parameters(), 1)
    optimizer.step()


@worlds
@both
@pytest.mark.parametrize(
    ("change", "name"), [("to_bfloat16", "0.weight"), ("to_double", "2.weight"), ("resize", "0.weight")]
)
def test_a_used_optimizer_names_what_was_converted(
    change: str, name: str, stage: int, backend: str, world_size: int
) -> None:
    """On all ranks."""
    for error in run_errors(backend, world_size, changed_after_a_step, change, stage):
        assert error.type_name == "RuntimeError"
        assert name in error.message


# --- parameters that are bound to other memory --------------------------------------------------------------


def rebind(model: nn.Module) -> None:
    """``p.data = q``."""
    for param in model.parameters():
        param.data = param.data * 2


def assign(model: nn.Module) -> None:
    """``load_state_dict(assign=True)`` keeps the Parameter objects of a model whose dict has plain tensors."""
    with torch.no_grad():
        vector = nn.utils.parameters_to_vector(model.parameters()) * 0.5
    nn.utils.vector_to_parameters(vector, model.parameters())


def transpose(model: nn.Module) -> None:
    """Other strides."""
    model[0].weight.data = (model[0].weight.data.t() * 3).t()  # type: ignore[index]


def exchange(model: nn.Module) -> None:
    """Two parameters change places in memory."""
    a, b = model[0].bias, nn.Parameter(torch.ones(3))  # type: ignore[index]
    a.data, b.data = b.data, a.data


REBINDINGS = {f.__name__: f for f in (rebind, assign, transpose, exchange)}


def rebound_training(_rank: int, _world_size: int, how: str, stage: int, form: str) -> list[list[float]]:
    """Job: parameters are re-bound between steps, and within a backward; against torch.optim.ASGD."""
    results = []
    for cls, options in (
        (ShardedASGD, {"stage": stage, **FORMS[form]}),
        (torch.optim.ASGD, {"foreach": form == "foreach"}),
    ):
        model = make_model()
        optimizer = cls(model.parameters(), lr=0.1, t0=0, **options)  # type: ignore[operator]
        for number in range(4):
            optimizer.zero_grad()
            if number in (1, 3):
                REBINDINGS[how](model)
            model(torch.full((2, 4), number + 1.0)).square().sum().backward()
            optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs)
    return [value.flatten().tolist() for value in results[0]]


@pytest.mark.parametrize(("backend", "world_size", "form"), CASES)
@both
@pytest.mark.parametrize("how", REBINDINGS)
def test_rebinding_is_followed_at_any_time(how: str, form: str, stage: int, backend: str, world_size: int) -> None:
    """Values go home, and training goes on as torch's."""
    first, *others = run(backend, world_size, rebound_training, how, stage, form)
    assert all(other == first for other in others)


def rebound_to_other_values(rank: int, _world_size: int, stage: int) -> None:
    """Job: after a good step rank 1 binds a parameter to other values than rank 0 has."""
    model = make_model()
    optimizer = ShardedASGD(model.named_parameters(), stage=stage)
    for number in range(2):
        set_gradients(model.parameters(), number)
        if number == 1 and rank == 1:
            model[2].weight.data = model[2].weight.data + 1
        optimizer.step()
        optimizer.zero_grad()
        assert number == 0


@both
def test_rebinding_to_different_values(stage: int) -> None:
    """All ranks name the parameter, before anything is updated."""
    for error in run_errors("gloo", 2, rebound_to_other_values, stage):
        assert error.type_name == "RuntimeError"
        for word in ("2.weight", "re-bound", "rank 1"):
            assert word in error.message


@both
def test_parameters_that_were_bound_to_one_memory(stage: int) -> None:
    """They are tied for torch; here they would come apart, so it is an error."""
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
    optimizer = ShardedASGD([("a", a), ("b", b)], stage=stage)
    a.data = b.data
    a.grad, b.grad = torch.ones(3), torch.ones(3)
    with pytest.raises(ValueError, match=r"(a and b|b and a) share memory"):
        optimizer.step()


def test_rebinding_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """In the log, with the parameter's name, once the optimizer has stepped: trainers move models before that."""
    a = nn.Parameter(torch.ones(3))
    optimizer = ShardedASGD([("a", a)])
    for step in range(3):
        a.data = a.data.clone()
        a.grad = torch.ones(3)
        optimizer.step()
        if step == 0:
            assert not caplog.records, "moved before the first step"
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "parameter a was re-bound (p.data = ...)"
    ]


# --- two optimizers -----------------------------------------------------------------------------------------


def two_optimizers(_rank: int, _world_size: int, stage: int, used: bool) -> None:
    """Job: a second optimizer is given the parameters of the first, which is used afterwards."""
    model = make_model()
    first = ShardedASGD(model.named_parameters(), stage=stage)
    if used:
        set_gradients(model.parameters(), 0)
        first.step()
        first.zero_grad()
    second = ShardedASGD([{"params": [("head", model[2].weight)]}], stage=stage)
    set_gradients(model.parameters(), 0)
    second.step()
    first.step()


@worlds
@both
@pytest.mark.parametrize("used", [True, False])
def test_two_optimizers_of_the_same_parameters(used: bool, stage: int, backend: str, world_size: int) -> None:
    """The first one says who has the parameter now."""
    for error in run_errors(backend, world_size, two_optimizers, stage, used):
        assert error.type_name == "RuntimeError"
        for word in ("2.weight", "another ShardedASGD", "as head"):
            assert word in error.message


# --- edits of param_groups ----------------------------------------------------------------------------------


def reverse(groups: list[dict[str, Any]], _: list[nn.Parameter]) -> None:
    """Another order inside a group."""
    groups[0]["params"].reverse()


def move(groups: list[dict[str, Any]], _: list[nn.Parameter]) -> None:
    """From one group to another."""
    groups[1]["params"].append(groups[0]["params"].pop(0))


def remove(groups: list[dict[str, Any]], _: list[nn.Parameter]) -> None:
    """Out of the groups."""
    groups[0]["params"].pop(0)


def append(groups: list[dict[str, Any]], spare: list[nn.Parameter]) -> None:
    """A new parameter."""
    groups[0]["params"].append(spare[0])


def replace_one(groups: list[dict[str, Any]], spare: list[nn.Parameter]) -> None:
    """A new parameter in the place of another."""
    groups[1]["params"][0] = spare[0]


def new_list(groups: list[dict[str, Any]], _: list[nn.Parameter]) -> None:
    """Another list of the same parameters: nothing has changed."""
    groups[0]["params"] = list(groups[0]["params"])


def pop_group(groups: list[dict[str, Any]], _: list[nn.Parameter]) -> None:
    """A group less."""
    groups.pop(0)


def append_group(groups: list[dict[str, Any]], spare: list[nn.Parameter]) -> None:
    """A group more."""
    groups.append({**groups[0], "params": [spare[0]], "lr": 0.3})


def swap_groups(groups: list[dict[str, Any]], _: list[nn.Parameter]) -> None:
    """Groups in another order."""
    groups.reverse()


EDITS = {
    f.__name__: f for f in (reverse, move, remove, append, replace_one, new_list, pop_group, append_group, swap_groups)
}


def edited(
    _rank: int, _world_size: int, edit: str, moment: str, stage: int, form: str, dtype: torch.dtype
) -> list[list[float]]:
    """Job: an edit between steps; parameters, state and the full state dict against torch.optim.ASGD."""
    results = []
    for cls, options in (
        (ShardedASGD, {"stage": stage, **FORMS[form]}),
        (torch.optim.ASGD, {"foreach": form == "foreach"}),
    ):
        torch.manual_seed(5)
        params = [nn.Parameter(torch.randn(n, dtype=dtype)) for n in (5, 3, 4, 2, 6)]
        if cls is ShardedASGD:
            options["average_dtype"] = dtype
        groups = [{"params": params[:2]}, {"params": params[2:4], "lr": 0.5, "weight_decay": 0.1}]
        optimizer = cls(groups, lr=0.1, t0=0, **options)  # type: ignore[operator]
        generator = torch.Generator().manual_seed(9)
        for number in range(4):
            optimizer.zero_grad()
            if number == 2 and moment == "before backward":
                EDITS[edit](optimizer.param_groups, params[4:])
            coefficients = [torch.randn(p.shape, generator=generator).to(dtype) for p in params]
            sum((p * c).sum() for p, c in zip(params, coefficients, strict=True)).backward()
            if number == 2 and moment == "after backward":
                EDITS[edit](optimizer.param_groups, params[4:])
            optimizer.step()
        if cls is torch.optim.ASGD:
            # torch's state_dict() fails on state of parameters that are in no group.
            listed = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for param in [p for p in optimizer.state if id(p) not in listed]:
                del optimizer.state[param]
        saved = optimizer.consolidated_state_dict(to=None) if cls is ShardedASGD else optimizer.state_dict()
        results.append((params, {i: saved["state"][i]["ax"] for i in sorted(saved["state"])}, saved["param_groups"]))
    (ours, averages, own_groups), (torchs, torch_averages, torch_groups) = results
    tight = {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in torchs], **tight)
    torch.testing.assert_close(averages, torch_averages, **tight)
    assert [group["params"] for group in own_groups] == [group["params"] for group in torch_groups]
    return [p.detach().flatten().tolist() for p in ours]


@pytest.mark.parametrize(("backend", "world_size", "form"), CASES)
@both
@pytest.mark.parametrize("moment", ["before backward", "after backward"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_param_groups_does_what_it_does_in_torch(
    edit: str, moment: str, form: str, stage: int, backend: str, world_size: int
) -> None:
    """To the bit, and state dicts are numbered as torch numbers them; a parameter that comes back goes on."""
    first, *others = run(backend, world_size, edited, edit, moment, stage, form, torch.float32)
    assert all(other == first for other in others)


def test_a_parameter_that_comes_back_goes_on() -> None:
    """Its state stays in ``optimizer.state`` meanwhile, as in torch."""
    for cls in (ShardedASGD, torch.optim.ASGD):
        a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
        optimizer = cls([a, b], lr=0.1, t0=0)
        for number in range(6):
            if number == 2:
                optimizer.param_groups[0]["params"].pop()
            if number == 4:
                optimizer.param_groups[0]["params"].append(b)
            a.grad, b.grad = torch.ones(3), torch.ones(2)
            optimizer.step()
        assert optimizer.state[b]["step"] == 4
        result = (a.tolist(), b.tolist(), optimizer.state[b]["ax"].flatten().tolist())
        if cls is ShardedASGD:
            ours = result
    assert ours == result
