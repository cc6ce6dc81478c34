"""``update_batch_norm()`` against torch.optim.swa_utils.update_bn on the batches of all ranks."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn

from dist_asgd import ShardedASGD, ShardedAverage, export_averaged, update_batch_norm
from tests.harness.bits import assert_same_bits
from tests.harness.ranks import run, run_errors

WORLDS = [("none", 1), ("gloo", 2), ("gloo", 3)]
worlds = pytest.mark.parametrize(("backend", "world_size"), WORLDS)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Net(nn.Module):
    """A BatchNorm of each dimension; one of them is called twice, one tracks nothing, and one is in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(6, 8)
        self.norm1 = nn.BatchNorm1d(8, momentum=0.3)
        self.untracked = nn.BatchNorm1d(8, track_running_stats=False)
        self.conv = nn.Conv2d(2, 3, 1)
        self.norm2 = nn.BatchNorm2d(3)
        self.norm3 = nn.BatchNorm3d(3, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.untracked(self.norm1(self.first(x))) * 3)
        x = self.norm2(self.conv(x.view(-1, 2, 2, 2)))
        y: Tensor = self.norm3(x[..., None] * 2 + 1)
        return y.square().mean()


def batches(rank: int) -> list[Tensor]:
    """Those of ``rank``: another number, and other sizes, on each."""
    generator = torch.Generator().manual_seed(rank)
    sizes = [4 + i + rank for i in range(1 + 2 * rank)]
    return [torch.randn(size, 6, generator=generator, dtype=torch.float64) * (1 + rank) + size for size in sizes]


def trained(model: nn.Module, wrapped: nn.Module | None = None) -> ShardedAverage:
    """An average of three steps; the last iterate differs from it."""
    average = ShardedAverage(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(3):
        loss = (wrapped or model)(torch.randn(5, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update()
    return average


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the statistics of all layers."""
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(STATISTICS)}


def settings(model: nn.Module) -> list[Any]:
    """Modes and momenta of all modules."""
    return [(module.training, getattr(module, "momentum", None)) for module in model.modules()]


def oracle(model: nn.Module, average: ShardedAverage | ShardedASGD, world_size: int) -> dict[str, Tensor]:
    """The statistics that torch finds for the averages in the batches of all ranks, one after the other."""
    with average.averaged_parameters():
        other = copy.deepcopy(model)
    update_bn([batch for rank in range(world_size) for batch in batches(rank)], other)
    return statistics(other)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for the rounding of a mean of up to 9 batches in float64."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=64 * 2**-52, atol=64 * 2**-52)


def estimates(rank: int, world_size: int, inside: bool) -> dict[str, Tensor]:
    """Job: the statistics are torch's; parameters, modes and momenta are those of before."""
    model = Net().double()
    average = trained(model)
    model.norm2.eval()
    before, params = settings(model), [p.detach().clone() for p in model.parameters()]
    expected = oracle(model, average, world_size)
    loader = ((batch, "label") for batch in batches(rank))
    if inside:
        with average.averaged_parameters():
            assert update_batch_norm(loader, model) == 3
    else:
        assert update_batch_norm(loader, model, average, device="cpu") == 3
    found = statistics(model)
    assert_close(found, expected)
    assert settings(model) == before
    for param, value in zip(model.parameters(), params, strict=True):
        assert_same_bits(param.detach(), value, "a parameter afterwards")
    return found


@worlds
@pytest.mark.parametrize("inside", [False, True], ids=["with the average", "inside its block"])
def test_statistics_are_those_of_torch_for_all_batches(backend: str, world_size: int, inside: bool) -> None:
    """With other numbers of batches, of other sizes, on each rank; all ranks have the same bits."""
    first, *others = run(backend, world_size, estimates, inside)
    for other in others:
        for name, value in first.items():
            assert_same_bits(other[name], value, name)


def exports(rank: int, world_size: int, folder: str) -> None:
    """Job: a model with the averages and the new statistics, from an optimizer."""
    model = Net().double()
    optimizer = ShardedASGD(model.parameters(), lr=0.5, t0=0)
    for step in range(3):
        model(batches(9)[step]).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = oracle(model, optimizer, world_size)
    update_batch_norm(batches(rank), model, optimizer)
    path = Path(folder, f"averaged-{world_size}.safetensors")
    export_averaged(path, model, optimizer)
    exported = load_file(path)
    assert_close({name: exported[name] for name in expected}, expected)
    with optimizer.averaged_parameters():
        assert_same_bits(exported["conv.weight"], model.conv.weight.detach(), "an exported average")


@pytest.mark.parametrize(("backend", "world_size"), WORLDS[:2])
def test_an_export_afterwards_has_averages_and_statistics(backend: str, world_size: int, tmp_path: Path) -> None:
    """In this order."""
    run(backend, world_size, exports, str(tmp_path))


def failing(rank: int, _world_size: int, where: str) -> None:
    """Job: the last rank fails in its second batch; nothing of the call is left anywhere."""
    model = Net().double()
    average = trained(model)
    before, kept = settings(model), statistics(model)
    fails = rank == dist.get_world_size() - 1

    def loader() -> Iterator[Tensor]:
        yield batches(0)[0]
        if fails and where == "loader":
            raise KeyError("no such file")
        yield batches(0)[0][:, : 5 if fails and where == "forward" else 6]
        yield batches(0)[0]

    try:
        update_batch_norm(loader(), model, average)
    finally:
        assert settings(model) == before
        for name, value in statistics(model).items():
            assert_same_bits(value, kept[name], name)
        # All ranks have left the block together.
        with average.averaged_parameters():
            pass


@pytest.mark.parametrize(("where", "kind"), [("loader", "KeyError"), ("forward", "RuntimeError")])
def test_an_error_on_one_rank_is_raised_on_all(where: str, kind: str) -> None:
    """Before the next batch, with the rank; modes, momenta and statistics are back."""
    for error in run_errors("gloo", 2, failing, where):
        assert error.type_name == kind
        assert "rank 1 of 2" in error.message


def wrapped(rank: int, _world_size: int) -> None:
    """Job: DDP, which would send the buffers of rank 0 before a forward, and rank 0 has no batch."""
    model = Net().double()
    ddp = DistributedDataParallel(model)
    average = trained(model, ddp)
    with average.averaged_parameters():
        other = copy.deepcopy(model)
    update_bn(batches(1), other)
    # A forward with gradients, after which DDP would send buffers.
    ddp(batches(0)[0])
    update_batch_norm(batches(rank) if rank else [], ddp, average)
    assert_close(statistics(model), statistics(other))
    assert ddp.require_forward_param_sync


def test_ddp_with_a_rank_without_batches() -> None:
    """It gets the statistics of the other one, which does not wait for it."""
    run("gloo", 2, wrapped)


def gathering(rank: int, world_size: int) -> None:
    """Job: FSDP2, whose forwards are collective; ranks without batches take part and count nothing."""
    plain = Net().double()
    expected = oracle(plain, trained(plain), world_size)
    model = Net().double()
    mesh = init_device_mesh("cpu", (world_size,))
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)
    average = trained(model)
    update_batch_norm(batches(rank), model, average)
    found = statistics(model)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
    # The gathered parameters of the last forward were averages.
    model(batches(0)[0]).backward()


def test_fsdp2_with_unequal_numbers_of_batches() -> None:
    """On 2 ranks."""
    run("gloo", 2, gathering)


def test_a_model_without_batch_norm_is_left_alone() -> None:
    """The loader is not read, and a warning says so."""
    model = nn.Linear(2, 2)

    def loader() -> Iterator[Tensor]:
        pytest.fail("the loader was read")
        yield torch.zeros(1, 2)

    with pytest.warns(UserWarning, match="Linear has no BatchNorm layer that tracks running statistics"):
        assert update_batch_norm(loader(), model, ShardedAverage(model)) == 0


def test_what_is_refused() -> None:
    """By name, before anything is changed."""
    model = Net().double()
    average = trained(model)
    kept = statistics(model)
    copying = ShardedAverage(model, buffers="copy")
    copying.update()
    lazy = nn.Sequential(nn.Linear(6, 3), nn.LazyBatchNorm1d())
    cases: list[tuple[Any, ...]] = [
        (ValueError, "1 is a LazyBatchNorm1d that has seen no batch", (batches(0), lazy), {}),
        (ValueError, "Construct it with buffers='keep'", (batches(0), model, copying), {}),
        (ValueError, "none of the average's parameters", (batches(0), Net(), average), {}),
        (ValueError, "process_group with average", (batches(0), model, average), {"process_group": object()}),
        (
            TypeError,
            "average must be a ShardedAverage or a ShardedASGD, got SGD",
            (batches(0), model),
            {"average": torch.optim.SGD(model.parameters(), lr=1)},
        ),
        (ValueError, "no rank has a batch", (iter(()), model, average), {}),
    ]
    for kind, text, args, options in cases:
        with pytest.raises(kind, match=text):
            update_batch_norm(*args, **options)
    for name, value in statistics(model).items():
        assert_same_bits(value, kept[name], name)


def unequal(rank: int, _world_size: int, kind: str) -> None:
    """Job: rank 0 has no batch, and the forward of rank 1 needs it."""
    model = Net().double()
    if kind == "sync":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    update_batch_norm(batches(1)[:rank], model)


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("sync", ["norm1 is a SyncBatchNorm", "Pass as many batches on every rank. [on rank 0 of 2]"]),
        ("fsdp2", ["this rank has no batch, and the forward of the others needs it", "[on rank 0 of 2]"]),
    ],
)
def test_collective_forwards_that_cannot_be_completed(kind: str, texts: list[str]) -> None:
    """An error on all ranks, and no wait for the others."""
    for error in run_errors("gloo", 2, unequal, kind):
        assert error.type_name == "ValueError"
        for text in texts:
            assert text in error.message
