"""``export_averaged``: the weights that ``torch.optim.ASGD`` would average, streamed to safetensors files."""

import json
import resource
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_asgd import ShardedASGD, export_averaged
from dist_asgd.checkpoint.format.safetensors import TensorFiles, TensorSpec, outputs_at
from tests.harness.bits import assert_same_bits, same_tree
from tests.harness.models import mlp, odd_net
from tests.harness.ranks import run, run_errors

WORLDS = [("none", 1), ("gloo", 1), ("gloo", 2), ("gloo", 3), ("gloo", 4)]
OPTIONS: dict[str, Any] = {"lr": 0.2, "t0": 1, "foreach": False}


class Net(nn.Module):
    """An ``OddNet`` with buffers, and a parameter that the optimizer does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.net = odd_net()
        self.register_buffer("seen", torch.arange(5))
        self.register_buffer("mean", torch.linspace(0, 1, 3))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.apart = nn.Parameter(torch.full((3,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        """Run the ``OddNet``."""
        return self.net(x)  # type: ignore[no-any-return]


def trained(optimizer_class: type[torch.optim.Optimizer], steps: int, **options: Any) -> tuple[Net, Any]:
    """The model after some steps on the same gradients on every rank."""
    model = Net()
    optimizer = optimizer_class(model.net.parameters(), **{**OPTIONS, **options})
    for seed in range(steps):
        optimizer.zero_grad()
        give_gradients(model, seed)
        optimizer.step()
    return model, optimizer


def give_gradients(model: Net, seed: int) -> None:
    """Small multiples of a power of two, so that means over ranks are exact."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.net.named_parameters():
        if p.requires_grad and name != "unused":
            p.grad = torch.empty_like(p).copy_(torch.randint(-64, 65, p.shape, generator=generator) / 256)


def oracle(steps: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The export, from ``torch.optim.ASGD`` in this process."""
    model, optimizer = trained(torch.optim.ASGD, steps)
    expected = {}
    for name, value in model.state_dict(keep_vars=True).items():
        state = optimizer.state.get(value, {})
        begun = bool(state) and state["mu"].item() != 1
        chosen = state["ax"] if begun else value.detach()
        held = any(value is p for p in model.net.parameters())
        expected[name] = chosen.to(dtype) if dtype is not None and held else chosen
    return expected


def assert_exported(path: str, expected: dict[str, Tensor]) -> None:
    """Assert that safetensors reads the expected tensors, to the bit."""
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_bits(found[name], value.contiguous(), name)


def exports(rank: int, _world_size: int, stage: int, steps: int, dtype: torch.dtype | None, folder: str) -> None:
    """Job: export, look at it, train on as if nothing had been, export again over it."""
    model, optimizer = trained(ShardedASGD, steps, stage=stage, bucket_cap_mb=0.0005)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = f"{folder}/model.safetensors"
    export_averaged(path, model, optimizer, dtype)
    assert same_tree(dict(model.state_dict()), before)
    # Every rank may look as soon as it is back.
    assert_exported(path, oracle(steps, dtype))
    with safetensors.safe_open(path, "pt") as file:
        # One parameter never steps.
        averages = ("begun for some parameters", "3") if steps == 5 else ("not begun", "0")
        assert file.metadata() == {"format": "pt", "averaging": averages[0], "averaged_steps": averages[1]}
    optimizer.zero_grad()
    give_gradients(model, 99)
    optimizer.step()
    if rank == 0:
        assert [p.name for p in Path(folder).iterdir()] == ["model.safetensors"]
    export_averaged(path, model, optimizer, dtype, overwrite=True)


@pytest.mark.parametrize(
    ("backend", "world_size", "stage"), [*((*world, stage) for world in WORLDS for stage in (1, 2)), ("threads", 3, 1)]
)
@pytest.mark.parametrize(("steps", "dtype"), [(0, None), (2, None), (5, None), (5, torch.bfloat16)], ids=str)
def test_the_export_is_torchs_average(
    backend: str, world_size: int, stage: int, steps: int, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """The bits agree before the first step, before averaging begins and after; parameters are tied and odd."""
    run(backend, world_size, exports, stage, steps, dtype, str(tmp_path))


def test_an_export_before_averaging_has_begun_warns(tmp_path: Path) -> None:
    """It says that the file has the last iterate, and when averaging begins; an average makes no warning."""
    model, optimizer = trained(ShardedASGD, 1, t0=1e6)
    with pytest.warns(UserWarning, match=r"the file has the last iterate.*begins after step 1,000,000 \(t0\); this is"):
        export_averaged(tmp_path / "model.safetensors", model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Once for each optimizer.
        export_averaged(tmp_path / "model.safetensors", model, optimizer, overwrite=True)
        export_averaged(tmp_path / "model.safetensors", *trained(ShardedASGD, 5), overwrite=True)


def other_kinds(_rank: int, _world_size: int, folder: str) -> None:
    """Job: complex and 16-bit parameters, wrapped in DDP and compiled."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).to(torch.bfloat16)
    model.register_parameter("wave", nn.Parameter(torch.full((3, 5), 1 + 2j)))
    for p in model.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    optimizer = ShardedASGD(model.parameters(), lr=0.1, t0=0, bucket_cap_mb=0.0001)
    for step in range(4):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.25 * (step + 1))
        optimizer.step()
    wrapped: nn.Module = torch.compile(model)  # type: ignore[assignment]
    if torch.distributed.is_initialized():
        wrapped = nn.parallel.DistributedDataParallel(wrapped)
    whole = optimizer.consolidated_state_dict(to=None)["state"]
    export_averaged(f"{folder}/a.safetensors", wrapped, optimizer)
    expected = {name: whole[index]["ax"].to(p.dtype) for index, (name, p) in enumerate(model.named_parameters())}
    assert_exported(f"{folder}/a.safetensors", expected)
    with pytest.raises(ValueError, match=r"wave is torch\.complex64 and cannot be exported as torch\.float32"):
        export_averaged(f"{folder}/b.safetensors", model, optimizer, torch.float32)


@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
def test_other_dtypes_and_wrapped_models(backend: str, world_size: int, tmp_path: Path) -> None:
    """The average of a bf16 parameter is float32 and is rounded once; wrappers leave no trace in names."""
    run(backend, world_size, other_kinds, str(tmp_path))


def shards(rank: int, world_size: int, folder: str) -> None:
    """Job: several files, then one, then several again, each without traces of the other."""
    model = mlp(width=16, depth=2)
    optimizer = ShardedASGD(model.parameters(), lr=0.1, t0=0)
    path = f"{folder}/model.safetensors"
    names = []
    for max_bytes in (4000, 1 << 20, 6000, 4000):
        export_averaged(path, model, optimizer, max_bytes=max_bytes, overwrite=True)
        if rank == 0:
            names.append(sorted(p.name for p in Path(folder).iterdir()))
        if world_size > 1:
            torch.distributed.barrier()
    if rank:
        return
    assert names[1] == ["model.safetensors"]
    assert names[0] == names[3] != names[2]
    index = json.loads((Path(folder) / "model.safetensors.index.json").read_text())
    count = len(names[3]) - 1
    assert names[3] == [*(f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)), names[3][-1]]
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    found: dict[str, Tensor] = {}
    for name in sorted(set(index["weight_map"].values())):
        part = load_file(f"{folder}/{name}")
        assert all(index["weight_map"][key] == name for key in part)
        assert sum(t.nbytes for t in part.values()) <= 4000 or len(part) == 1
        found |= part
    assert same_tree(dict(sorted(found.items())), dict(sorted((n, p.detach()) for n, p in model.named_parameters())))


@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 2)])
def test_large_exports_are_several_files_with_an_index(backend: str, world_size: int, tmp_path: Path) -> None:
    """The files are as transformers loads them, and no file of an earlier export is left for a loader to find first."""
    run(backend, world_size, shards, str(tmp_path))


def refuses(rank: int, world_size: int, what: str, folder: str) -> None:
    """Job: an export that must fail."""
    model, optimizer = trained(ShardedASGD, 3, bucket_cap_mb=0.0005)
    path, dtype, other = f"{folder}/model.safetensors", None, model
    if what == "taken":
        Path(path).touch()
    elif what == "no folder":
        path = f"{folder}/none/model.safetensors"
    elif what == "a folder":
        Path(path).mkdir(exist_ok=True)
    elif what == "name":
        path = f"{folder}/model.pt"
    elif what == "dtype":
        dtype = torch.int32
    elif what == "model":
        other = Net()
    elif what == "dtypes differ":
        dtype = (torch.float32, torch.bfloat16)[rank == world_size - 1]
    elif what == "state":
        model.register_state_dict_post_hook(lambda _, state, *__: state.update(more={"a": 1}))
    elif what == "moved":
        model.net.scale.data = model.net.scale.data.double()
    if what == "inside":
        with optimizer.averaged_parameters():
            export_averaged(path, other, optimizer, dtype)
    export_averaged(path, other, optimizer, dtype)


REFUSED = {
    "taken": ("ValueError", "model.safetensors exists"),
    "no folder": ("ValueError", "there is no directory"),
    "a folder": ("ValueError", "is a directory"),
    "name": ("ValueError", "must end in .safetensors"),
    "dtype": ("ValueError", "wanted a floating-point dtype"),
    "model": ("ValueError", "is no parameter of the model"),
    "dtypes differ": ("ValueError", "arguments of export_averaged() differ between ranks"),
    "state": ("ValueError", "more in model.state_dict() is a dict"),
    "moved": ("RuntimeError", "was moved, re-cast or re-bound"),
    "inside": ("RuntimeError", "inside averaged_parameters()"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 3)])
def test_what_cannot_be_exported_is_an_error_on_every_rank(
    backend: str, world_size: int, what: str, tmp_path: Path
) -> None:
    """The error gives the reason, and no file is left behind."""
    if what == "dtypes differ" and world_size == 1:
        return
    kind, message = REFUSED[what]
    for error in run_errors(backend, world_size, refuses, what, str(tmp_path)):
        assert error.type_name == kind
        assert message in error.message
    assert not list(tmp_path.glob(".*"))


def full(rank: int, _world_size: int, folder: str) -> None:
    """Job: the disk is full half-way, on the writer only; training goes on afterwards."""
    model = mlp(width=64, depth=2)
    optimizer = ShardedASGD(model.parameters(), lr=0.1, t0=0, bucket_cap_mb=0.01)
    # The limit below holds for the group's own file too: first make all connections.
    path = Path(folder) / "model.safetensors"
    export_averaged(path, model, optimizer)
    if rank == 0:
        path.unlink()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(RuntimeError, match=r"cannot write .*model\.safetensors: File too large"):
            export_averaged(path, model, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(Path(folder).iterdir())
    optimizer.consolidated_state_dict()  # all ranks have looked before the writer begins again
    assert same_tree({name: p.detach() for name, p in model.named_parameters()}, before)
    export_averaged(path, model, optimizer)


@pytest.mark.parametrize(("backend", "world_size"), [("none", 1), ("gloo", 3)])
def test_a_full_disk_is_an_error_on_every_rank(backend: str, world_size: int, tmp_path: Path) -> None:
    """No file is left, no rank hangs, and the next export works."""
    run(backend, world_size, full, str(tmp_path))


def room(_rank: int, _world_size: int, folder: str) -> list[int]:
    """Job: the largest allocation on this rank while exporting, in bytes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and not any(
                isinstance(a, Tensor) and a.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
                for a in args
            ):
                sizes.append(out.untyped_storage().nbytes())
            return out

    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    optimizer = ShardedASGD(model.parameters(), lr=0.1, t0=0)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    with Watch():
        export_averaged(f"{folder}/model.safetensors", model, optimizer)
    return [max(sizes), sum(sizes)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_no_rank_holds_more_than_one_parameter(world_size: int, tmp_path: Path) -> None:
    """Rank 0 has one buffer, for the largest parameter, although all parameters are in one bucket of 133 kB."""
    largest = 64 * 64 * 4
    found = run("gloo", world_size, room, str(tmp_path))
    assert found[0][0] == largest
    assert found[0][1] < 2 * largest
    for most, total in found[1:]:
        assert most < 4096
        assert total < largest


# --- the files themselves ----------------------------------------------------------------------------------


def test_files_of_any_order_and_dtype(tmp_path: Path) -> None:
    """Every dtype that safetensors has, strided and conjugated tensors, odd names, written in reverse."""
    tensors: dict[str, Tensor] = {
        "bool": torch.tensor([True, False, True]),
        "half.weight": torch.randn(3, 5).half(),
        'ünïcode "quoted"\\': torch.randn(7).bfloat16(),
        "f8": torch.randn(3).to(torch.float8_e4m3fn),
        "double": torch.randn(2, 3, dtype=torch.float64).t(),
        "complex": torch.randn(3, dtype=torch.complex64).conj(),
        "zero": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        **{str(d): torch.arange(5).to(d) for d in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)},
        **{str(d): torch.arange(5).to(d) for d in (torch.uint16, torch.uint32, torch.uint64)},
        "negative": torch.imag(torch.randn(4, dtype=torch.complex64).conj()),
        "every second": torch.randn(10)[::2],
    }
    out = tmp_path / "all.safetensors"
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with TensorFiles(out, specs, metadata={"more": "text"}) as files:
        for name in reversed(tensors):
            files.write(name, tensors[name])
    found = load_file(out)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        resolved = tensor.resolve_conj().resolve_neg().contiguous()
        assert torch.equal(found[name].flatten().view(torch.uint8), resolved.flatten().view(torch.uint8)), name
    data = out.read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert header % 8 == 0
    for entry in json.loads(data[8 : 8 + header]).values():
        if "data_offsets" in entry and entry["dtype"] in ("F64", "I64", "C64", "U64"):
            assert entry["data_offsets"][0] % 8 == 0


def test_only_whole_files_get_their_name(tmp_path: Path) -> None:
    """A tensor that is missing, written twice or of another shape is an error, and no file is left."""
    out = tmp_path / "a.safetensors"
    specs = {"a": TensorSpec(torch.float32, (2,)), "b": TensorSpec(torch.float32, (2,))}

    def write(**tensors: Tensor) -> None:
        with TensorFiles(out, specs, metadata={}) as files:
            for name, tensor in tensors.items():
                files.write(name[0], tensor)

    with pytest.raises(ValueError, match="b was not written"):
        write(a=torch.zeros(2))
    with pytest.raises(ValueError, match="once"):
        write(a=torch.zeros(2), a_again=torch.zeros(2))
    with pytest.raises(ValueError, match=r"a is \[3\] torch.float32, wanted \[2\]"):
        write(a=torch.zeros(3))
    with pytest.raises(ValueError, match="complex128, which safetensors files do not hold"):
        TensorFiles(out, {"c": TensorSpec(torch.complex128, ())}, metadata={})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_leaves_the_old_export(tmp_path: Path) -> None:
    """The old files are removed only once the new ones are complete."""
    out = tmp_path / "a.safetensors"
    specs = {"a": TensorSpec(torch.float32, (2,))}
    with TensorFiles(out, specs, metadata={}) as files:
        files.write("a", torch.ones(2))
    with pytest.raises(KeyError), TensorFiles(out, specs, metadata={}, overwrite=True):
        raise KeyError
    assert torch.equal(load_file(out)["a"], torch.ones(2))
    (tmp_path / "a-00001-of-00002.safetensors.bak").touch()
    assert outputs_at(out) == [out]


def test_differentiable_and_foreign_optimizers_are_told_what_to_do(tmp_path: Path) -> None:
    """These optimizers have no shards, and the error names the command to use."""
    model = nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for optimizer in (
            torch.optim.ASGD(model.parameters()),
            ShardedASGD(model.parameters(), differentiable=True),
        ):
            with pytest.raises(TypeError, match="use dist-asgd export"):
                export_averaged(tmp_path / "a.safetensors", model, optimizer)
