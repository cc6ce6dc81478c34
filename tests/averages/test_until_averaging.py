"""Until averaging begins parameters stand for their averages: no memory, no writes, and everything that torch shows."""

import copy
import ctypes
import mmap
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dist_asgd import ShardedASGD, ShardedAverage, export_averaged, load_checkpoint, save_checkpoint
from dist_asgd.storage import huge_pages
from tests.harness.bits import assert_same_bits, same_bits
from tests.harness.deferred import as_device, maybe_deferred
from tests.harness.history import GroupSpec, History, ParamSpec, Step
from tests.harness.meshes import Net, assert_same_state, set_gradients, sharded
from tests.harness.ranks import run
from tests.harness.subject import Setting, check_history

SHAPES = [(40, 30), (7,), (33, 5), (64,)]
# The updates before averaging in float32, in torch operators, and with 16-bit averages.
FORMS: dict[str, dict[str, Any]] = {
    "kernel": {},
    "operators": {"fused": False},
    "bfloat16": {"average_dtype": torch.bfloat16},
}
both = pytest.mark.parametrize("stage", [1, 2])


def params_of(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


class Pair:
    """A ``ShardedASGD`` and a ``torch.optim.ASGD`` of equal parameters, which get equal gradients."""

    def __init__(self, seed: int, form: str, t0s: tuple[float, float] | None = None, **options: Any) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
        self.params, self.expected = params_of(dtype), params_of(dtype)
        t0s = t0s or self.random.choice([(2, 2), (3, 6), (1000, 4), (0, 2.5)])
        shared: dict[str, Any] = {"lr": 0.1, "lambd": 1e-2, "weight_decay": self.random.choice([0.0, 0.01])}
        self.ours = ShardedASGD(self.groups(self.params, t0s), bucket_cap_mb=0.004, **shared, **FORMS[form], **options)
        self.torchs = torch.optim.ASGD(self.groups(self.expected, t0s), foreach=False, **shared)
        self.in_backward = options.get("step_in_backward", False)
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.steps_unwritten = 0

    def groups(self, params: list[nn.Parameter], t0s: tuple[float, float]) -> list[dict[str, Any]]:
        """Two groups, each with a t0 of its own."""
        return [{"params": params[:2], "t0": t0s[0]}, {"params": params[2:], "t0": t0s[1]}]

    # --- events ------------------------------------------------------------------------------------------

    def step(self, every: bool = False) -> None:
        """Of all parameters, or of some of them."""
        stepping = [every or self.random.random() < 0.9 for _ in SHAPES]
        losses: dict[bool, list[Tensor]] = {True: [], False: []}
        for index, shape in enumerate(SHAPES):
            gradient = torch.randn(shape, generator=self.generator).to(self.params[0].dtype)
            if stepping[index]:
                for is_ours, params in ((True, self.params), (False, self.expected)):
                    losses[is_ours].append((params[index] * gradient).sum())
        for is_ours, optimizer in ((True, self.ours), (False, self.torchs)):
            if losses[is_ours]:
                torch.autograd.backward(torch.stack(losses[is_ours]).sum())
            optimizer.step()
            optimizer.zero_grad()
        self.steps_unwritten += self.ours.memory_report().unwritten_state_bytes > 0

    def write_params(self) -> None:
        """Between two steps: what averaging begins with is what the step before has left."""
        for index in range(len(SHAPES)):
            noise = torch.randn(SHAPES[index], generator=self.generator)
            for param in (self.params[index], self.expected[index]):
                param.data.add_(noise)
        self.step(every=True)

    def set_t0(self) -> None:
        """To an earlier or a later step."""
        position, t0 = self.random.randrange(2), float(self.random.randrange(12))
        for optimizer in (self.ours, self.torchs):
            optimizer.param_groups[position]["t0"] = t0

    def set_mu(self) -> None:
        """As a user may who knows torch's state."""
        for optimizer, params in ((self.ours, self.params), (self.torchs, self.expected)):
            for param in params:
                if self.has_stepped(param, params):
                    optimizer.state[param]["mu"].fill_(0.25)

    def begin(self) -> None:
        """Averaging begins now."""
        self.ours.start_averaging()
        for mine, theirs in zip(self.ours.param_groups, self.torchs.param_groups, strict=True):
            theirs["t0"] = mine["t0"]

    def write_averages(self) -> None:
        """Through ``optimizer.state``, without a look at the parameters."""
        for optimizer, params in ((self.ours, self.params), (self.torchs, self.expected)):
            for param in params[:2]:
                if self.has_stepped(param, params):
                    optimizer.state[param]["ax"].fill_(0.5)
        self.compare()

    def keep(self) -> None:
        """A reference shows the average of any later time."""
        if self.ours.communicators.world_size == 1 and self.has_stepped(self.params[0], self.params):
            ax = self.ours.state[self.params[0]]["ax"]
            self.kept.append((ax, self.torchs.state[self.expected[0]]["ax"]))

    def reload(self) -> None:
        """State whose averages are no copies of the parameters."""
        if self.params[0].dtype == torch.bfloat16:
            return  # torch casts eta and mu to the parameter's dtype
        saved = self.ours.consolidated_state_dict(to=None)
        theirs = copy.deepcopy(self.torchs.state_dict())
        for state in (saved, theirs):
            for entry in state["state"].values():
                entry["ax"] = entry["ax"] + 1
        self.ours.load_state_dict(saved)
        self.torchs.load_state_dict(theirs)
        self.kept.clear()
        self.compare()

    def swap(self) -> None:
        """What stands for an average stays in place."""
        before = [param.detach().clone() for param in self.params]
        with self.ours.averaged_parameters():
            for param, theirs in zip(self.params, self.expected, strict=True):
                entry = self.torchs.state.get(theirs, {})
                begun = "mu" in entry and entry["mu"].item() != 1
                assert_same_bits(param.detach(), entry["ax"] if begun else theirs.detach(), "inside")
        for param, value in zip(self.params, before, strict=True):
            assert_same_bits(param.detach(), value, "afterwards")

    def to_foreach(self) -> None:
        """And back: one step in each form."""
        if self.params[0].dtype == torch.float32:
            foreach = not self.torchs.param_groups[0]["foreach"]
            for position in range(2):
                self.ours.param_groups[position]["foreach"] = True if foreach else None
                self.torchs.param_groups[position]["foreach"] = foreach

    def show(self) -> None:
        """From a call of ``state_dict()`` on, averages are written."""
        self.ours.state_dict()
        assert self.ours.memory_report().unwritten_state_bytes == 0

    # --- comparisons -------------------------------------------------------------------------------------

    def has_stepped(self, param: Tensor, params: list[nn.Parameter]) -> bool:
        """Whether torch has state for the parameter."""
        index = next(i for i, other in enumerate(params) if other is param)
        return "ax" in self.torchs.state.get(self.expected[index], {})

    def compare(self) -> None:
        """All state, without a look into ``optimizer.state``."""
        saved = self.ours.consolidated_state_dict(to=None)["state"]
        for index, param in enumerate(self.expected):
            for key, value in self.torchs.state.get(param, {}).items():
                assert_same_bits(saved[index][key], value, f"{key} of parameter {index}")
        for found, expected in self.kept:
            assert_same_bits(found.view(expected.shape), expected, "an average that was kept")

    def run(self, num_events: int) -> int:
        """A random history; returns how many of its steps left averages unwritten."""
        rare: list[Callable[[], None]] = [self.write_params, self.set_t0, self.set_mu, self.begin, self.write_averages]
        rare += [self.keep, self.reload, self.swap, self.to_foreach, self.show]
        events = self.random.sample(rare, 4)
        for _ in range(num_events):
            if self.random.random() < 0.7:
                self.step()
            else:
                self.random.choice([*events, self.compare])()
            for found, expected in zip(self.params, self.expected, strict=True):
                assert_same_bits(found.detach(), expected.detach(), "parameter")
        self.compare()
        return self.steps_unwritten


EVENTS: dict[str, Callable[[Pair], None]] = {
    "parameters": Pair.write_params,
    "mu": Pair.set_mu,
    "begin": Pair.begin,
    "averages": Pair.write_averages,
    "kept": Pair.keep,
    "load": Pair.reload,
    "foreach": Pair.to_foreach,
    "shown": Pair.show,
}


def one_event(_rank: int, _world_size: int, form: str, options: dict[str, Any]) -> None:
    """Job: one kind of event after steps in which parameters stood for their averages, and between later ones."""
    for name, event in EVENTS.items():
        pair = Pair(1, form, (4, 6), **options)
        pair.step(every=True)
        pair.step(every=True)
        assert pair.steps_unwritten == 2, name
        for _ in range(5):
            event(pair)
            pair.swap()
            pair.step(every=True)
            pair.compare()


SETTINGS = pytest.mark.parametrize(
    ("backend", "world_size", "options"),
    [
        ("none", 1, {}),
        ("threads", 2, {"stage": 1}),
        ("threads", 2, {"stage": 2}),
        ("threads", 2, {"stage": 2, "step_in_backward": True}),
    ],
    ids=["one rank", "stage 1", "stage 2", "in backward"],
)
quiet = pytest.mark.filterwarnings("ignore:dist_asgd. averaged_parameters:UserWarning")
# On CPUs averages have addresses from construction on; on devices they have none before they are written.
everywhere = pytest.mark.parametrize("deferred", [False, True], ids=["cpu", "device"])


@quiet
@SETTINGS
@everywhere
@pytest.mark.parametrize("form", FORMS)
def test_whatever_comes_between_has_the_bits_of_torch(
    form: str, deferred: bool, backend: str, world_size: int, options: dict[str, Any]
) -> None:
    """In both groups, before averaging begins in each and after."""
    with maybe_deferred(deferred):
        run(backend, world_size, one_event, form, options)


def histories(_rank: int, _world_size: int, seeds: range, form: str, options: dict[str, Any]) -> int:
    """Job: histories, each from its seed."""
    return sum(Pair(seed, form, **options).run(24) for seed in seeds)


@quiet
@SETTINGS
@everywhere
@pytest.mark.parametrize("form", ["kernel", "operators"])
def test_any_history_has_the_bits_of_torch(
    form: str, deferred: bool, backend: str, world_size: int, options: dict[str, Any]
) -> None:
    """With edits of t0, mu, averages and parameters, loads, swaps and other implementations, before and after t0."""
    with maybe_deferred(deferred):
        assert min(run(backend, world_size, histories, range(3), form, options)) > 3


# --- memory ----------------------------------------------------------------------------------------------


def resident_bytes(tensor: Tensor) -> int:
    """The bytes of ``tensor`` that are in memory, as far as whole pages of it are."""
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    pages = (ctypes.c_ubyte * ((tensor.data_ptr() + tensor.nbytes - start) // page))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(pages) * page), pages) == 0
    return page * sum(value & 1 for value in pages)


class Large(nn.Module):
    """A model whose averages lie in mappings of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1 << 19, generator=torch.Generator().manual_seed(0)))


def takes_none(_rank: int, world_size: int, stage: int, fused: bool | None, path: Path) -> None:
    """Job: steps, saves and exports take no memory for averages; averaging does, and a later t0 gives it back."""
    model = Large()
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=4, stage=stage, fused=fused)
    (average,) = [bucket.average for bucket in optimizer.shards.buckets]
    assert average.nbytes == 4 * model.weight.numel() // world_size >= huge_pages.MAPPED_BYTES

    def step(until: int) -> None:
        while optimizer.state[model.weight]["step"].item() < until:
            torch.autograd.backward(model.weight.sum())
            optimizer.step()
            optimizer.zero_grad()

    step(3)
    save_checkpoint(path / "before", model, optimizer, step=3)
    optimizer.consolidated_state_dict()
    export_averaged(path / "before.safetensors", model, optimizer)
    assert resident_bytes(average) == 0
    assert optimizer.memory_report().unwritten_state_bytes == optimizer.memory_report().state_bytes == average.nbytes
    step(5)
    assert resident_bytes(average) == 0, "the iterate of step t0 + 1 is copied"
    step(6)
    assert resident_bytes(average) == average.nbytes
    assert optimizer.memory_report().unwritten_state_bytes == 0
    optimizer.param_groups[0]["t0"] = 100.0
    step(8)
    assert resident_bytes(average) == 0
    load_checkpoint(path / "before", model, optimizer)
    assert resident_bytes(average) == average.nbytes, "what was loaded is kept"
    step(4)
    assert resident_bytes(average) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is not given back")
@pytest.mark.parametrize(("stage", "fused"), [(1, None), (2, None), (2, False)])
def test_averages_take_no_memory_before(stage: int, fused: bool | None, tmp_path: Path) -> None:
    """The system counts the pages."""
    run("gloo", 2, takes_none, stage, fused, tmp_path)


# --- who sees averages -----------------------------------------------------------------------------------

READERS: dict[str, Callable[[dict[Any, Any]], Any]] = {
    "item": lambda entry: entry["ax"],
    "get": lambda entry: entry.get("ax"),
    "items": lambda entry: {key: value for key, value in entry.items()}["ax"],  # noqa: C416 - through items()
    "values": lambda entry: next(value for value in entry.values() if value.numel() > 1),
    "dict": lambda entry: dict(entry)["ax"],
    "unpacked": lambda entry: {**entry}["ax"],
    "union": lambda entry: (entry | {})["ax"],
    "union of another": lambda entry: ({} | entry)["ax"],
    "copy": lambda entry: entry.copy()["ax"],
    "copied": lambda entry: copy.copy(entry)["ax"],
    "deepcopy": lambda entry: copy.deepcopy(entry)["ax"],
    "pickle": lambda entry: pickle.loads(pickle.dumps(entry))["ax"],
    "setdefault": lambda entry: entry.setdefault("ax", torch.zeros(())),
    "pop": lambda entry: entry.pop("ax"),
    "popitem": lambda entry: entry.popitem()[1],
}


@everywhere
@pytest.mark.parametrize("reader", READERS)
def test_every_way_to_read_an_entry_shows_the_average(reader: str, deferred: bool) -> None:
    """It is the parameter's value then, and stays that of the state from then on."""
    param = nn.Parameter(torch.arange(6.0))
    with maybe_deferred(deferred):
        read_an_entry(READERS[reader], "pop" not in reader, param, ShardedASGD([param], lr=0.1))


def read_an_entry(
    read: Callable[[dict[Any, Any]], Any], stays: bool, param: nn.Parameter, optimizer: ShardedASGD
) -> None:
    """Read the only entry, which stays in the state or not."""
    param.grad = torch.ones(6)
    optimizer.step()
    entry = optimizer.state[param]
    assert list(entry) == ["step", "eta", "mu", "ax"]
    assert entry["step"].item() == 1.0
    assert "ax" in entry
    assert optimizer.memory_report().unwritten_state_bytes == optimizer.memory_report().state_bytes
    found = read(entry)
    assert_same_bits(found, param.detach(), "ax")
    assert optimizer.memory_report().unwritten_state_bytes == 0
    if stays:
        optimizer.step()
        assert_same_bits(optimizer.state[param]["ax"], param.detach(), "ax after another step")
        assert optimizer.memory_report().unwritten_state_bytes == 0


@everywhere
def test_a_parameter_that_never_stepped_has_zeros(deferred: bool) -> None:
    """It does not stand for its average, and neither do its neighbours in the bucket."""
    params = params_of()
    with maybe_deferred(deferred):
        optimizer = ShardedASGD(params, lr=0.1)
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
        assert not optimizer.state[params[1]]["ax"].any()
        assert_same_bits(optimizer.state[params[0]]["ax"].view(SHAPES[0]), params[0].detach(), "ax")


def shows(_rank: int, world_size: int, stage: int) -> None:
    """Job: tensors of a state dict go on changing, and a write to one is no write to the parameter."""
    pair = Pair(0, "kernel", stage=stage)
    for _ in range(2):
        pair.step(every=True)
    live = pair.ours.state_dict()["state"]
    for _ in range(6):
        pair.step(every=True)
        for index, member in enumerate(pair.ours.shards.members):
            average = live[index]["ax"] if world_size == 1 else live[index]["ax"].to_local()
            theirs = member.fragment_of(pair.torchs.state[pair.expected[index]]["ax"])
            assert same_bits(average.reshape(-1), theirs)
    before = [param.detach().clone() for param in pair.params]
    for param in pair.params:
        pair.ours.state[param]["ax"].zero_()
    assert all(same_bits(p.detach(), b) for p, b in zip(pair.params, before, strict=True))


@both
@everywhere
@pytest.mark.parametrize("world_size", [1, 2])
def test_state_dicts_stay_live(world_size: int, deferred: bool, stage: int) -> None:
    """As torch's do."""
    with maybe_deferred(deferred):
        run("none" if world_size == 1 else "threads", world_size, shows, stage)


def put_back(_rank: int, _world_size: int, stage: int) -> None:
    """Job: a load that a hook refuses changes nothing, and parameters stand for their averages afterwards."""
    pair = Pair(0, "kernel", (4, 6), stage=stage)
    pair.step(every=True)
    other = pair.ours.consolidated_state_dict(to=None)
    for entry in other["state"].values():
        entry["ax"] = entry["ax"] + 1

    def refuse(_optimizer: torch.optim.Optimizer) -> None:
        raise KeyError("refused")

    handle = pair.ours.register_load_state_dict_post_hook(refuse)
    with pytest.raises(KeyError, match="refused"):
        pair.ours.load_state_dict(other)
    handle.remove()
    assert pair.ours.memory_report().unwritten_state_bytes
    for _ in range(8):
        pair.compare()
        pair.step(every=True)


@both
@everywhere
def test_a_refused_load_is_put_back(deferred: bool, stage: int) -> None:
    """To the bit."""
    with maybe_deferred(deferred):
        run("threads", 2, put_back, stage)


def beside_another(_rank: int, _world_size: int, stage: int) -> None:
    """Job: with averages of another rule in place of the parameters, the state is what the last step has left."""
    pair = Pair(0, "kernel", (9, 9), stage=stage)
    beside = ShardedAverage(pair.params, decay=0.5)
    for _ in range(3):
        pair.step(every=True)
        beside.update()
    with beside.averaged_parameters():
        assert not same_bits(pair.params[0].detach(), pair.expected[0].detach())
        pair.compare()
    pair.step(every=True)
    # A device keeps the memory that they got there.
    assert pair.steps_unwritten == (3 if pair.ours.shards.buckets[0].defers_average else 4)
    pair.compare()


@both
@everywhere
def test_another_average_in_place_of_the_parameters(deferred: bool, stage: int) -> None:
    """They cannot stand for their averages there."""
    with maybe_deferred(deferred):
        run("threads", 2, beside_another, stage)


# --- presharded parameters -------------------------------------------------------------------------------


def of_dtensors(_rank: int, world_size: int, kind: str) -> None:
    """Job: state before averaging, at its beginning and after, with parameters that are written between steps."""
    model, plain = sharded(kind, world_size), Net(0)
    optimizer = ShardedASGD(model.parameters(), lr=0.1, t0=3)
    torchs = torch.optim.ASGD(plain.parameters(), lr=0.1, t0=3, foreach=False)
    for step in range(8):
        for each, other in ((model, optimizer), (plain, torchs)):
            for param in each.parameters():
                param.data.mul_(0.5)
            set_gradients(each, step)
            other.step()
        report = optimizer.memory_report()
        assert report.unwritten_state_bytes == (report.state_bytes if step < 4 else 0)
        saved = optimizer.consolidated_state_dict(to=None)["state"]
        for index, param in enumerate(plain.parameters()):
            for key, value in torchs.state.get(param, {}).items():
                assert_same_bits(saved[index][key], value, f"{key} of parameter {index} after step {step}")
    assert_same_state(optimizer, torchs, model, plain, "in optimizer.state")


@everywhere
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2_offload", "hsdp", "replicas", "tp"])
def test_dtensors_stand_for_their_averages(kind: str, deferred: bool) -> None:
    """Where they lie, also if replicas share the work."""
    if deferred:
        run("gloo", 2, as_device, of_dtensors, kind)
    else:
        run("gloo", 2, of_dtensors, kind)


@everywhere
def test_dtensors_in_another_memory_order(deferred: bool) -> None:
    """What has no memory has no order either: full state is read where the parameters stand for it."""
    history = History((GroupSpec((ParamSpec((65, 3), layout="transposed"), ParamSpec(()))),), (Step(), Step()))
    job = (history, Setting(1, "forloop", 0.001, placement="shard"))
    if deferred:
        run("gloo", 2, as_device, check_history, *job)
    else:
        run("gloo", 2, check_history, *job)


def of_two_optimizers(_rank: int, world_size: int) -> None:
    """Job: a DTensor stands for its average in two optimizers when another average takes its place."""
    mesh = init_device_mesh("cpu", (world_size,))
    draw = torch.Generator().manual_seed(0)
    weight = nn.Parameter(distribute_tensor(torch.randn(8, 3, generator=draw), mesh, [Shard(0)]))
    optimizers = [ShardedASGD([weight], lr=0.1, t0=1000) for _ in range(2)]
    average = ShardedAverage([weight], decay=0.5)
    for _ in range(3):
        for optimizer in optimizers:
            weight.grad = distribute_tensor(torch.randn(8, 3, generator=draw), mesh, [Shard(0)])
            optimizer.step()
        average.update()
    last = weight.to_local().detach().clone()
    with average.averaged_parameters():
        assert not torch.equal(weight.to_local(), last)
        for number, optimizer in enumerate(optimizers):
            assert_same_bits(optimizer.state[weight]["ax"].to_local(), last, f"ax of optimizer {number}")


@pytest.mark.parametrize("deferred", [False, True], ids=["cpu", "device"])
def test_two_optimizers_of_one_dtensor(deferred: bool) -> None:
    """Both have the values from before, not those that take their place."""
    run("gloo", 2, as_device if deferred else of_two_optimizers, *((of_two_optimizers,) if deferred else ()))


def loads_in_order(_rank: int, world_size: int, path: Path) -> None:
    """Job: load averages of DTensors whose memory is in another order than their elements."""
    mesh = init_device_mesh("cpu", (world_size,))
    saved: list[Tensor] = []
    for seed in (0, 1):
        values = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)).t()
        model = Listed([nn.Parameter(distribute_tensor(values, mesh, [Shard(0)]))])
        assert not model.params[0].is_contiguous()
        optimizer = ShardedASGD(model.parameters(), lr=0.1, t0=0)
        if seed == 0:
            for _ in range(4):
                torch.autograd.backward(model.params[0].square().sum())
                optimizer.step()
                optimizer.zero_grad()
            save_checkpoint(path / "saved", model, optimizer, step=4)
        else:
            load_checkpoint(path / "saved", model, optimizer)
        saved.append(optimizer.consolidated_state_dict(to=None)["state"][0]["ax"])
    assert_same_bits(saved[1], saved[0], "ax")


def test_a_load_into_averages_without_memory(tmp_path: Path) -> None:
    """Their placeholder has no order, and the load has that of the parameter."""
    run("gloo", 2, as_device, loads_in_order, tmp_path)


# --- checkpoints -----------------------------------------------------------------------------------------


class Listed(nn.Module):
    """The parameters of a ``Pair`` as a module."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__()
        self.params = nn.ParameterList(params)


def round_trip(_rank: int, _world_size: int, stage: int, path: Path) -> None:
    """Job: whatever is saved before, at or after t0 comes back, and goes on as torch's does."""
    for steps in (1, 3, 4, 5, 8):
        pair = Pair(steps, "kernel", stage=stage)
        for _ in range(steps):
            pair.step(every=True)
        folder = path / str(steps)
        save_checkpoint(folder, Listed(pair.params), pair.ours, step=steps)
        others = params_of()
        other = ShardedASGD(pair.groups(others, (9, 9)), stage=stage)
        load_checkpoint(folder, Listed(others), other)
        pair.params, pair.ours = others, other
        pair.compare()
        for _ in range(5):
            pair.step(every=True)
            pair.compare()


@both
def test_checkpoints_before_at_and_after_t0(stage: int, tmp_path: Path) -> None:
    """Of groups that begin at different steps."""
    run("gloo", 2, round_trip, stage, tmp_path)


def test_checkpoints_on_a_device(tmp_path: Path) -> None:
    """The same where averages have no memory yet."""
    run("gloo", 2, as_device, round_trip, 2, tmp_path)
