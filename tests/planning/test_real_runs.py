"""A plan beside real runs on Gloo ranks: the bytes of ``memory_report()``, and every byte and message that is sent.

``stats()`` counts the same bytes, by kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dist_asgd import Plan, ShardedASGD, Stats, plan
from dist_asgd.planning.choice import FSDP2, HSDP, HYBRID1, HYBRID2, STAGE1, STAGE2, UNSHARDED
from dist_asgd.storage.layout import MIB
from tests.harness.meshes import hybrid_mesh
from tests.harness.models import mlp, mlp_loss, odd_loss, odd_net
from tests.harness.ranks import run

STEPS = 3
# The kinds of a plan's transfers by the attributes of ``Stats`` that count them.
SENT = {
    "sent_gradient_bytes": ("reduce-scatter", "all-reduce"),
    "sent_parameter_bytes": ("all-gather",),
    "sent_control_bytes": ("control exchange",),
}


class Wide(nn.Module):
    """Tensors above and below the size that Gloo sends directly, norms, biases, a tied and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(310, 601, bias=False)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(601, 403), nn.LayerNorm(403), nn.Linear(403, 601)) for _ in range(2)
        )
        self.head = nn.Linear(310, 601, bias=False)
        self.head.weight = self.embed.weight
        self.small = nn.Parameter(torch.ones(3, 5))
        self.fixed = nn.Linear(7, 601)
        self.fixed.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 310)`` to a number."""
        hidden = self.embed(x)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return (hidden * self.head(x)).mean() * self.small.sum()


def wide_loss(model: nn.Module, seed: int) -> Tensor:
    """The loss of a ``Wide`` on the batch that ``seed`` draws."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 310, generator=generator)
    loss: Tensor = model(x.to(next(model.parameters()).dtype))
    return loss


Loss = Callable[[nn.Module, int], Tensor]
# What a rank holds, the messages that it has sent, and what it says of them.
Report = tuple[dict[str, int], Counter[str], Stats]
MODELS: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "odd": (odd_net, odd_loss),
    "mlp": (lambda: mlp(width=40, depth=4), mlp_loss),
    "wide": (Wide, wide_loss),
}


@contextmanager
def counting(sent: Counter[str]) -> Iterator[None]:
    """Inside, the messages that this rank sends are counted, and their bytes."""
    isend = dist.isend

    def count(tensor: Tensor, dst: int, **options: Any) -> Any:
        sent["messages"] += 1
        sent["bytes"] += tensor.nbytes
        return isend(tensor, dst, **options)

    dist.isend = count  # type: ignore[assignment]
    try:
        yield
    finally:
        dist.isend = isend  # type: ignore[assignment]


def trains(
    rank: int, _world_size: int, kind: str, mode: str, mesh: tuple[int, int] | None, dtype: Any, options: dict[str, Any]
) -> Report:
    """Job: some steps; returns what the optimizer holds then, and what this rank has sent in the last one."""
    build, loss = MODELS[kind]
    model = build().to(dtype)
    grid = None if mesh is None else hybrid_mesh(mesh)
    if mode in (FSDP2, HSDP):
        shards = init_device_mesh("cpu", (dist.get_world_size(),)) if grid is None else grid
        for child in getattr(model, "layers", ()):
            fully_shard(child, mesh=shards)
        fully_shard(model, mesh=shards)
        grid = None
    stage = 2 if mode in (STAGE2, HYBRID2) else 1
    optimizer = ShardedASGD(model.parameters(), lr=1e-3, stage=stage, mesh=grid, shared_memory=False, **options)
    sent: Counter[str] = Counter()
    for step in range(STEPS):
        optimizer.zero_grad()
        optimizer.stats(reset=True)
        with counting(sent if step == STEPS - 1 else Counter()):
            if mode in (STAGE1, HYBRID1):
                for param in filter(lambda p: p.requires_grad, model.parameters()):
                    param.grad = torch.full_like(param, 1e-3)
            else:
                loss(model, 10 * step + rank).backward()
            optimizer.step()
    return asdict(optimizer.memory_report()), sent, optimizer.stats()


def check(found: Plan, mode: str, reports: list[Report], case: str) -> None:
    """Compare every kind of bytes on the first rank, the largest total of all ranks, and what the first has sent.

    What each rank says that it has sent is what its messages hold.
    """
    row = found.row(mode)
    planned = {
        "parameter_bytes": row.bytes.parameters,
        "padding_bytes": row.bytes.padding,
        "state_bytes": row.bytes.average,
        "master_bytes": row.bytes.masters,
        "gradient_bytes": row.bytes.gradients,
        "in_flight_bytes": row.bytes.buffers,
    }
    reported = [report for report, _, _ in reports]
    for kind, expected in planned.items():
        assert reported[0][kind] == pytest.approx(expected, rel=0.01), f"{kind} of {case}"
    kept = [kind for kind in planned if kind != "padding_bytes"]
    largest = max(sum(report[kind] for kind in kept) for report in reported)
    assert sum(planned[kind] for kind in kept) == pytest.approx(largest, rel=0.01), case
    own = [transfer for transfer in row.traffic if transfer.by == "dist_asgd"]
    assert sum(transfer.sent_bytes for transfer in own) == pytest.approx(reports[0][1]["bytes"], rel=0.01), case
    assert sum(transfer.messages or 0 for transfer in own) == reports[0][1]["messages"], case
    for kind, names in SENT.items():
        expected = sum(transfer.sent_bytes for transfer in own if transfer.kind in names)
        assert getattr(reports[0][2], kind) == pytest.approx(expected, rel=0.01), f"{kind} of {case}"
    for _, sent, stats in reports:
        assert sum(getattr(stats, kind) for kind in SENT) == sent["bytes"], case
        assert (stats.steps, stats.skipped_steps, stats.sent_other_bytes) == (1, 0, 0), case


BF16 = torch.bfloat16
# The model, the mode, the mesh, the dtype of the parameters, and options of both; after the number of ranks.
Case = tuple[str, str, tuple[int, int] | None, torch.dtype, dict[str, Any]]
CASES: list[tuple[int, *Case]] = [
    (2, "odd", STAGE1, None, torch.float32, {}),
    (4, "wide", STAGE1, None, BF16, {"master_weights": True}),
    (4, "mlp", HYBRID1, (2, 2), torch.float32, {"average_dtype": torch.float64}),
    (2, "odd", STAGE2, None, torch.float32, {}),
    (2, "mlp", STAGE2, None, torch.float32, {"bucket_cap_mb": 0.02}),
    (2, "wide", STAGE2, None, BF16, {}),
    (4, "wide", STAGE2, None, torch.float32, {}),
    (4, "wide", STAGE2, None, torch.float32, {"reduce_dtype": BF16, "bucket_cap_mb": 0.5}),
    (4, "odd", STAGE2, None, torch.float32, {"bucket_cap_mb": 0.001}),
    (4, "wide", HYBRID2, (2, 2), torch.float32, {}),
    (4, "wide", HYBRID2, (2, 2), BF16, {"master_weights": True, "reduce_dtype": torch.float32}),
    (4, "mlp", HYBRID2, (4, 1), torch.float32, {"bucket_cap_mb": 0.02}),
    (2, "wide", FSDP2, None, torch.float32, {}),
    (4, "wide", FSDP2, None, BF16, {"master_weights": True, "average_dtype": BF16}),
    (4, "mlp", FSDP2, None, torch.float32, {}),
    (4, "wide", HSDP, (2, 2), torch.float32, {}),
    (4, "mlp", HSDP, (2, 2), torch.float32, {"bucket_cap_mb": 0.02}),
]


def trains_in_turn(rank: int, world_size: int, cases: list[Case]) -> list[Report]:
    """Job: one case after the other."""
    return [trains(rank, world_size, *case) for case in cases]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_plan_agrees_with_real_ranks(ranks: int) -> None:
    """To 1% for each kind of bytes and for what is sent; the number of messages to the last one."""
    cases = [case for number, *case in CASES if number == ranks]
    for case, *reports in zip(cases, *run("gloo", ranks, trains_in_turn, cases), strict=True):
        kind, mode, mesh, dtype, options = case
        with torch.device("meta"):
            model = MODELS[kind][0]().to(dtype)
        assert all(param.is_meta for param in model.parameters())
        found = plan(model, ranks=ranks, mesh=mesh, backend="gloo", **options)
        check(found, mode, reports, str(case))


def test_ddp_makes_as_many_buckets_as_planned() -> None:
    """By torch's own assignment, with its default caps."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(width, 900) for width in (7, 4000, 30, 8000, 500, 3000, 2000, 1)))
    sizes = [MIB, 25 * MIB]
    assigned, _ = dist._compute_bucket_assignment_by_size(list(reversed(list(model.parameters()))), sizes)
    (sent,) = (transfer for transfer in plan(model, ranks=2).row(UNSHARDED).traffic if transfer.by == "DDP")
    assert sent.calls == len(assigned)
