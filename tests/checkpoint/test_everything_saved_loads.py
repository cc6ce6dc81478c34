"""What a save accepts, a load returns: objects, containers, dtypes, layouts and torch's own modules.

Whatever a load would refuse is refused by the save, by its name, on all ranks, and nothing is left of it.
"""

from __future__ import annotations

import copy
import io
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

from dist_asgd import (
    CheckpointManager,
    ShardedASGD,
    async_save_checkpoint,
    export_averaged,
    load_checkpoint,
    read_extra,
    save_checkpoint,
)
from dist_asgd.checkpoint.offline import convert
from dist_asgd.checkpoint.offline.contents import CheckpointContents
from dist_asgd.checkpoint.offline.diff import compare
from dist_asgd.checkpoint.values import same_bits, same_values
from tests.harness.ranks import run, run_errors


class Keeper(nn.Module):
    """A layer that keeps any value beside its weight, and any tensor in a buffer."""

    def __init__(self, kept: Any = None, buffer: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.kept = kept
        self.register_buffer("buffer", buffer)

    def forward(self, x: Tensor) -> Tensor:
        """Return a linear function of ``x``."""
        return x @ self.weight.T

    def get_extra_state(self) -> Any:
        """Return the value."""
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        """Keep ``state``."""
        self.kept = state


def built(kept: Any = None, buffer: Tensor | None = None, option: Any = None) -> tuple[Keeper, ShardedASGD]:
    """Return a model and its optimizer, with ``option`` in the parameter group."""
    model = Keeper(kept, buffer)
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=0)
    optimizer.param_groups[0]["option"] = option
    return model, optimizer


OBJECTS: dict[str, Any] = {
    "dict": {"scale": 1.0, "on": True, "none": None},
    "empty dict": {},
    "list": [1, "two", 3.0],
    "empty list": [],
    "tuple": (1, (2, [3])),
    "keys that are no strings": {1: "a", (2, 3): "b", None: "c", 1.5: "d"},
    "nested with tensors": {
        "a": [torch.arange(3), {"at": 4, 2: (1, torch.ones(2))}],
        "n": {},
        "l": [],
        7: torch.tensor(2.0),
    },
    "list with tensors": [torch.ones(2, 3), {}, [torch.tensor(True)], []],
    "tuple with tensors": (torch.ones(2), {"a": torch.zeros(1)}),
    "OrderedDict": OrderedDict(b=torch.ones(1), a=2),
    "Counter": Counter("aab"),
    "set": {1, 2},
    "BytesIO": io.BytesIO(b"scales and amax"),
    "bytes": b"\x00\xff",
    "complex": 1 + 2j,
    "float that is no number": float("nan"),
    "long int": 1 << 200,
    "text": "\u00e4\U0001f600",
    "tensor": torch.arange(5, dtype=torch.int16),
    "0-dim tensor": torch.tensor(3.0, dtype=torch.float64),
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "Size": torch.Size([2, 3]),
    "64 deep": eval("[" * 60 + "]" * 60),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_is_the_same_after_a_load(name: str, tmp_path: Path) -> None:
    """As a module's extra state, an option of a group and in ``extra``; whatever the new model has there."""
    value = OBJECTS[name]
    model, optimizer = built(value, option=value)
    save_checkpoint(tmp_path / "c", model, optimizer, step=1, extra={"mine": [value]})
    for fresh in (None, {}, copy.deepcopy(value)):
        other, loaded = built(fresh, option="live")
        extra = load_checkpoint(tmp_path / "c", other, loaded)
        assert same_values(other.kept, value)
        assert same_values(loaded.param_groups[0]["option"], value)
        assert same_values(extra, {"mine": [value]})
    convert.consolidate(CheckpointContents(tmp_path / "c"), tmp_path / "c.pt")
    whole = torch.load(tmp_path / "c.pt", weights_only=True)
    other, loaded = built()
    other.load_state_dict(whole["model"])
    assert same_values(other.kept, value)
    assert same_values(whole["optim"]["param_groups"][0]["option"], value)
    assert set(CheckpointContents(tmp_path / "c").model) <= {"weight", "_extra_state"}


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_goes_to_torch_and_comes_back(name: str, tmp_path: Path) -> None:
    """torch's recipe reads what this package writes, and the other way round."""
    value = OBJECTS[name]
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, _ = built(value)
    asgd = torch.optim.ASGD(model.parameters())
    weights, state = get_state_dict(model, asgd, options=options)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    # torch restores a container only into one of the same keys.
    other, optimizer = built(_blank(value))
    load_checkpoint(tmp_path / "theirs", other, optimizer, verify=False)
    assert same_values(other.kept, value)

    if name == "list with tensors":
        return  # DCP does not load its own here: of an empty dict in a list it writes nothing, and wants it
    save_checkpoint(tmp_path / "ours", *built(value), step=1)
    found = []
    for folder in ("ours", "theirs"):
        weights = get_model_state_dict(built(_blank(value))[0])
        dcp.load({"model": weights}, checkpoint_id=tmp_path / folder, no_dist=True)
        found.append(weights.get("_extra_state"))
    assert same_values(*found)


def _blank(value: Any) -> Any:
    """Return ``value`` with zeros in place of its tensors."""
    if isinstance(value, Tensor):
        return torch.zeros_like(value)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _blank(inner)) for key, inner in value.items())
    return [_blank(inner) for inner in value] if type(value) is list else copy.deepcopy(value)


SCALARS = [
    np.float64(0.25),
    np.float32(0.5),
    np.float16(0.5),
    np.int64(3),
    np.bool_(True),
    np.array(0.25),
]


@pytest.mark.parametrize("scalar", SCALARS, ids=lambda value: type(value).__name__)
def test_scalars_of_numpy_become_plain_ones(scalar: Any, tmp_path: Path) -> None:
    """Also as lr, in containers and as their keys."""
    keyed = scalar if scalar.ndim == 0 and isinstance(scalar, np.generic) else 1
    model, optimizer = built({"a": [scalar, (scalar,)], keyed: 1}, option=scalar)
    if isinstance(scalar, np.floating):
        optimizer.param_groups[0]["lr"] = scalar
    save_checkpoint(tmp_path / "c", model, optimizer, step=1, extra=[scalar])
    other, loaded = built()
    extra = load_checkpoint(tmp_path / "c", other, loaded)
    plain = scalar.item()
    for found in (extra[0], loaded.param_groups[0]["option"], other.kept["a"][0], other.kept["a"][1][0]):
        assert type(found) is type(plain)
        assert found == plain
    assert type(loaded.param_groups[0]["lr"]) is float
    assert isinstance(model.kept["a"][0], type(scalar)), "the caller's own value is not changed"


Pair = namedtuple("Pair", "a b")


class Color(IntEnum):
    """A number that is more than a number."""

    RED = 1


REFUSED: dict[str, Callable[[], Any]] = {
    "ndarray": lambda: np.ones(3),
    "longdouble": lambda: np.longdouble(1),
    "defaultdict": lambda: defaultdict(list, a=[1]),
    "Pair": lambda: Pair(1, 2),
    "Color": lambda: Color.RED,
    "frozenset": lambda: frozenset([1]),
    "bytearray": lambda: bytearray(b"a"),
    "Generator": torch.Generator,
    "slice": lambda: slice(1),
    "function": lambda: test_scalars_of_numpy_become_plain_ones,
    "int": lambda: 10**700,
    "list": lambda: eval("[" * 70 + "]" * 70),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("place", ["extra state", "option", "extra"])
def test_what_would_not_load_is_refused_by_name(kind: str, place: str, tmp_path: Path) -> None:
    """The checkpoints that were there stay, the error has the key and the type, and the next save works."""
    value = REFUSED[kind]()
    model, optimizer = built()
    manager = CheckpointManager(tmp_path, keep=1)
    manager.save(model, optimizer, step=1)
    extra = None
    if place == "extra state":
        model.kept, key = {"deep": [1, {"bad": value}]}, "_extra_state['deep'][1]['bad']"
    elif place == "option":
        optimizer.param_groups[0]["sched"], key = {"bad": value}, "optim.param_groups.weight.sched['bad']"
    else:
        extra, key = {"rng": (value,)}, "extra['rng'][0]"
    with pytest.raises(ValueError, match="cannot be saved so that it loads safely") as error:
        manager.save(model, optimizer, step=2, extra=extra)
    assert key in str(error.value)
    assert kind in str(error.value)
    assert manager.steps() == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    model.kept, optimizer.param_groups[0]["sched"] = None, None
    manager.save(model, optimizer, step=2)
    assert manager.restore(model, optimizer) is not None


SPECIAL: dict[str, Callable[[], Any]] = {
    "conjugate": lambda: torch.tensor([1j]).conj(),
    "negative": lambda: torch.tensor([1j]).conj().imag,
    "sparse": lambda: torch.eye(2).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "meta": lambda: torch.ones(2, device="meta"),
    "storage": lambda: torch.ones(2).untyped_storage(),
    "NaN as a key": lambda: {float("nan"): 1},
    "NaN in a set": lambda: {float("nan"), 1},
    "tensor as a key": lambda: {torch.ones(1): [torch.zeros(1)]},
    "tensor in a set": lambda: {torch.ones(1), torch.zeros(1)},
}


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_options_of_a_group_are_compared_whatever_they_are(name: str, tmp_path: Path) -> None:
    """All parameters of the group have it, and ``diff`` finds no difference either."""
    for folder in ("a", "b"):
        model = nn.Linear(2, 2)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1)
        optimizer.param_groups[0]["option"] = (SPECIAL[name](),)
        save_checkpoint(tmp_path / folder, model, optimizer, step=1, extra=[SPECIAL[name]()])
    other = ShardedASGD(model.named_parameters(), lr=0.1)
    load_checkpoint(tmp_path / "a", model, other)
    # torch makes typed storages of untyped ones.
    assert name == "storage" or same_values(other.param_groups[0]["option"], (SPECIAL[name](),))
    assert not list(compare(CheckpointContents(tmp_path / "a"), CheckpointContents(tmp_path / "b")))


@pytest.mark.parametrize("layout", ["nested", "compressed"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_option_that_optimizers_cannot_copy_is_refused(layout: str, tmp_path: Path) -> None:
    """Loading copies it, in torch too. As a module's extra state it loads, twice: into what is there already."""
    made = torch.nested.nested_tensor([torch.ones(1)]) if layout == "nested" else torch.eye(2).to_sparse_csr()
    with pytest.raises(ValueError, match=r"the option 'option' of param_groups holds a tensor .* that copy.deepcopy"):
        save_checkpoint(tmp_path / "c", *built(option=(made,)), step=1)
    model, optimizer = built((made,))
    save_checkpoint(tmp_path / "c", model, optimizer, step=1)
    load_checkpoint(tmp_path / "c", model, optimizer)
    load_checkpoint(tmp_path / "c", model, optimizer)
    assert same_values(model.kept, (made,))


def test_a_model_that_keeps_what_autograd_computed_takes_a_checkpoint(tmp_path: Path) -> None:
    """The backup of its extra state holds such tensors too."""
    model, optimizer = built({"amax": [torch.ones(2, requires_grad=True) * 2]})
    save_checkpoint(tmp_path / "c", model, optimizer, step=1)
    load_checkpoint(tmp_path / "c", model, optimizer)
    assert model.kept["amax"][0].equal(torch.full((2,), 2.0))


@pytest.mark.parametrize("place", ["extra state", "option", "state", "state of a parameter"])
def test_a_container_inside_itself_is_refused_by_name(place: str, tmp_path: Path) -> None:
    """Only inside ``extra``, which stays whole, it loads."""
    value: list[Any] = [1]
    value.append(value)
    model, optimizer = built(value if place == "extra state" else None, option=value if place == "option" else None)
    if place.startswith("state"):
        entries: Any = optimizer.state if place == "state" else optimizer.state[model.weight]
        entries["mine"] = value
    with pytest.raises(ValueError, match=r"(_extra_state|option|mine)\b.* \(list\) cannot be saved so that it loads"):
        save_checkpoint(tmp_path / "c", model, optimizer, step=1)


# --- tensors --------------------------------------------------------------------------------------------------

DTYPES = [
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32),
    *(torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64),
    *(torch.complex128, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    *(torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_buffer_of_any_dtype_loads(dtype: torch.dtype, tmp_path: Path) -> None:
    """All that DCP accepts, as a buffer, inside an extra state, and saved in the background."""
    buffer = torch.ones(32, dtype=torch.uint8).view(dtype)
    model, optimizer = built({"inner": buffer}, buffer)
    async_save_checkpoint(tmp_path / "c", model, optimizer, step=1).wait()
    other, loaded = built(None, torch.zeros(32, dtype=torch.uint8).view(dtype))
    load_checkpoint(tmp_path / "c", other, loaded)
    assert same_bits(other.buffer, buffer)
    assert same_bits(other.kept["inner"], buffer)


class Tagged(Tensor):
    """A tensor that has a class of its own, and no memory of another one."""


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "empty": lambda: torch.zeros(0, 3),
    "0-dim": lambda: torch.tensor(7),
    "expanded": lambda: torch.arange(3.0).expand(4, 3),
    "permuted": lambda: torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    "strided": lambda: torch.arange(20.0)[::3],
    "channels last": lambda: torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "conjugate": lambda: torch.tensor([1 + 2j, 3j]).conj(),
    "negative": lambda: torch.tensor([1 + 2j, 3j]).conj().imag,
    "subclass": lambda: torch.ones(3).as_subclass(Tagged),
    "parameter": lambda: nn.Parameter(torch.ones(3)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_buffer_of_any_layout_loads(layout: str, tmp_path: Path) -> None:
    """Values are the same, however they lay in memory."""
    buffer = LAYOUTS[layout]().detach()
    model, optimizer = built({"inner": LAYOUTS[layout]()}, buffer)
    save_checkpoint(tmp_path / "c", model, optimizer, step=1)
    other, loaded = built(None, torch.zeros(buffer.shape, dtype=buffer.dtype))
    load_checkpoint(tmp_path / "c", other, loaded)
    assert torch.equal(other.buffer, buffer)
    assert torch.equal(other.kept["inner"], buffer)


class Wrapping(Tensor):
    """A tensor whose data lies in another one."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapping:
        """Make a tensor of the shape of ``inner``."""
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner  # type: ignore[attr-defined]
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute with the inner tensors."""
        args = torch.utils._pytree.tree_map_only(Wrapping, lambda wrapped: wrapped.inner, args)
        result = func(*args, **(kwargs or {}))
        return cls(result) if func is torch.ops.aten.detach.default else result


UNSAVABLE: dict[str, Callable[[], Tensor]] = {
    "sparse_coo": lambda: torch.eye(2).to_sparse(),
    "sparse_csr": lambda: torch.eye(2).to_sparse_csr(),
    "meta": lambda: torch.empty(2, device="meta"),
    "bits8": lambda: torch.zeros(2, dtype=torch.uint8).view(torch.bits8),
    "int4": lambda: torch.zeros(2, dtype=torch.uint8).view(torch.int4),
    "qint8": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "Wrapping": lambda: Wrapping(torch.ones(2)),
    "not initialized": nn.UninitializedBuffer,
    "Tensor": lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
}


@pytest.mark.parametrize("kind", UNSAVABLE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tensor_that_would_not_load_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    """And nothing is written."""
    model, optimizer = built()
    model.buffer = UNSAVABLE[kind]()
    with pytest.raises(ValueError, match=r"model\.buffer is a tensor that a checkpoint cannot hold") as error:
        save_checkpoint(tmp_path / "c", model, optimizer, step=1)
    assert kind in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["with.dot", 3, ""])
def test_an_option_whose_name_would_be_lost_is_refused(option: Any, tmp_path: Path) -> None:
    """DCP joins names by dots."""
    model, optimizer = built()
    optimizer.param_groups[0][option] = 1
    with pytest.raises(ValueError, match="param_groups has an option"):
        save_checkpoint(tmp_path / "c", model, optimizer, step=1)


def test_equal_keys_and_keys_that_are_no_text_are_refused(tmp_path: Path) -> None:
    """They differ in the dict, and not in the file."""
    for kept, match in (({1: 2, "1": 3}, "must differ as strings"), ({"\ud800": 1, "a": 2}, "no text")):
        with pytest.raises(ValueError, match=match):
            save_checkpoint(tmp_path / "c", *built(kept), step=1)


def test_groups_with_equal_options_get_objects_of_their_own(tmp_path: Path) -> None:
    """And options of several elements, or NaN, load."""
    options = {"table": torch.arange(6.0), "best": float("nan"), "log": [1], "tree": {"a": [2], "t": torch.ones(2)}}

    def two() -> tuple[nn.Module, ShardedASGD]:
        model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        groups = [{"params": list(layer.named_parameters()), **copy.deepcopy(options)} for layer in model]
        return model, ShardedASGD(groups, lr=0.1)

    save_checkpoint(tmp_path / "c", *two(), step=1)
    model, optimizer = two()
    for group in optimizer.param_groups:
        group.update(dict.fromkeys(options))
    load_checkpoint(tmp_path / "c", model, optimizer)
    first, second = optimizer.param_groups
    for key, value in options.items():
        assert same_values(first[key], value)
        assert same_values(second[key], value)
    assert first["log"] is not second["log"]
    assert first["tree"]["a"] is not second["tree"]["a"]


# --- several ranks ---------------------------------------------------------------------------------------------

KINDS = ["stage 1", "stage 2", "fsdp2"]


def sharded(kind: str, kept: Any, option: Any = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model with a ``Keeper`` and its optimizer. Collective."""
    model = nn.Sequential(Keeper(kept), nn.Linear(2, 3))
    if kind == "fsdp2":
        fully_shard(model)
    stage = 2 if kind == "stage 2" else 1
    optimizer = ShardedASGD([{"params": list(model.named_parameters()), "option": option}], lr=0.1, stage=stage)
    return model, optimizer


def saves_and_loads(rank: int, _world_size: int, kind: str, path: str) -> None:
    """Job: change everything after a save in the background has returned, and load it."""
    tensor = torch.arange(4.0)
    value = {"amax": [tensor, {}], 3: (1, 2), "log": [1], "out": io.BytesIO(b"a")}
    wanted = copy.deepcopy(value)
    model, optimizer = sharded(kind, value, value)
    pending = async_save_checkpoint(path, model, optimizer, step=1, extra={"rank": np.int64(rank)})
    tensor.zero_()
    value["log"].append(2)  # type: ignore[attr-defined]
    pending.wait()
    other, loaded = sharded(kind, None)
    assert load_checkpoint(path, other, loaded) == {"rank": rank}
    assert same_values(other[0].kept, wanted)
    assert same_values(loaded.param_groups[0]["option"], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_objects_load_on_all_ranks(kind: str, tmp_path: Path) -> None:
    """As they were when the save returned, on each rank."""
    run("gloo", 2, saves_and_loads, kind, str(tmp_path / "c"))
    assert read_extra(tmp_path / "c", rank=1) == {"rank": 1}


def saves_the_unloadable(rank: int, _world_size: int, kind: str, path: str) -> None:
    """Job: one rank has what does not load."""
    model, optimizer = sharded(kind, None)
    save_checkpoint(path, model, optimizer, step=1, extra={"seeds": [np.ones(2) if rank else 1]})


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_refuses_and_all_raise(kind: str, tmp_path: Path) -> None:
    """The error names the key, the type and the rank."""
    for error in run_errors("gloo", 2, saves_the_unloadable, kind, str(tmp_path / "c")):
        assert "extra['seeds'][0] (numpy.ndarray)" in error.message
    assert not list(tmp_path.iterdir())


# --- torch's own modules -----------------------------------------------------------------------------------------

MODULES: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.PReLU(), nn.Linear(4, 2)),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    "recurrent": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 2)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(3, 2)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(3, 2), "weight", amount=2),
    "observer": lambda: nn.Sequential(nn.Linear(3, 2), torch.ao.quantization.HistogramObserver()),
    "fake quantized": lambda: nn.Sequential(nn.Linear(3, 2), torch.ao.quantization.FakeQuantize()),
    "averaged model": lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(3, 2), use_buffers=True),
    "complex": lambda: nn.Linear(3, 2, dtype=torch.complex64),
    "float64": lambda: nn.Bilinear(2, 3, 4, dtype=torch.float64),
    "frozen half": lambda: nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2, dtype=torch.float16).requires_grad_(False)]),
    "embeddings": lambda: nn.ModuleDict({"e": nn.Embedding(5, 3, padding_idx=0), "b": nn.EmbeddingBag(4, 2)}),
    "convolutions": lambda: nn.Sequential(nn.Conv2d(1, 2, 3).to(memory_format=torch.channels_last), nn.GroupNorm(1, 2)),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_modules_of_torch_load_and_export(name: str, tmp_path: Path) -> None:
    """Every entry of the state dict is the same, and each average that has begun is what both exports write."""
    from safetensors.torch import load_file

    torch.manual_seed(0)
    model, fresh = MODULES[name](), MODULES[name]()
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=0)
    for seed in range(3):
        for param in model.parameters():
            if param.requires_grad:
                torch.manual_seed(seed)
                param.grad = torch.randn_like(param)
        optimizer.step()
    save_checkpoint(tmp_path / "c", model, optimizer, step=3)
    load_checkpoint(tmp_path / "c", fresh, ShardedASGD(fresh.named_parameters()))
    assert same_values(dict(fresh.state_dict()), dict(model.state_dict()))

    export_averaged(tmp_path / "job.safetensors", model, optimizer)
    contents = CheckpointContents(tmp_path / "c")
    convert.export(contents, tmp_path / "file.safetensors", convert.plan_export(contents, False, None))
    averages = {id(param): entry["ax"] for param, entry in optimizer.state.items() if "ax" in entry}
    job, file = load_file(tmp_path / "job.safetensors"), load_file(tmp_path / "file.safetensors")
    assert same_values(job, file)
    live = {
        key.removeprefix("module.") if name == "averaged model" else key: value
        for key, value in model.state_dict(keep_vars=True).items()
    }
    for key, value in live.items():
        found = job[key] if key in job else job["module." + key]
        assert same_bits(found, averages.get(id(value), value).reshape(value.shape).to(value.dtype))
