"""NCCL itself, as far as one GPU goes: a world of one that is bound to its device."""

from __future__ import annotations

import tempfile
import time
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.gpu.rows import Part
from benchmarks.gpu.streams import OPTIONS, backward, params_on
from dist_asgd import ShardedASGD
from dist_asgd.comm import Communicators
from dist_asgd.comm.native import NativeCollectives

TIMEOUT = timedelta(seconds=60)


def run(part: Part) -> None:
    """Each collective by itself, and training by them; on CPUs with Gloo."""
    backend = "gloo" if part.cpu else "nccl"
    with tempfile.TemporaryDirectory() as folder:
        bound: dict[str, Any] = {} if part.cpu else {"device_id": part.device}
        start = time.perf_counter()
        store = dist.FileStore(f"{folder}/store", 1)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT, **bound)
        try:
            dist.barrier()
            part.add(f"{backend} world of one, first barrier", f"{time.perf_counter() - start:.2f} s")
            free = 0 if part.cpu else torch.cuda.mem_get_info()[0]
            start = time.perf_counter()
            group = dist.new_group([0], backend=backend, use_local_synchronization=True)
            for averages in (True, False):
                with part.attempt(f"collectives, averages={averages}"):
                    _collectives(part, NativeCollectives(group, averages))
            part.add("own group, with its first collectives", f"{time.perf_counter() - start:.2f} s")
            if not part.cpu:
                part.add("memory of its communicator", f"{(free - torch.cuda.mem_get_info()[0]) / 2**20:.0f} MiB")
            for averages in (True, False):
                for stage in (1, 2):
                    with part.attempt(f"training, averages={averages}, stage {stage}"):
                        _train(part, NativeCollectives(group, averages), stage)
        finally:
            dist.destroy_process_group()


def _collectives(part: Part, collectives: NativeCollectives) -> None:
    values = torch.arange(64.0, device=part.device)
    shard = torch.zeros_like(values)
    collectives.reduce_scatter([[(0, values.clone())]], shard, False, 0).wait()
    summed, gathered = values.clone(), values.clone()
    collectives.all_reduce(summed, 0)()
    collectives.all_gather(gathered)()
    reduced = [collectives.reduce_scalars(values.double(), op) for op in ("sum", "max", "min")]
    part.wait()
    name = "means" if collectives._averages else "sums"
    results = {"reduce-scatter": shard, "all-reduce": summed, "all-gather": gathered}
    for what, result in results.items():
        part.check(f"{what}, {name} by the backend", torch.equal(result, values))
    part.check(f"scalars, {name} by the backend", all(torch.equal(r, values.double()) for r in reduced))


def _train(part: Part, collectives: NativeCollectives, stage: int) -> None:
    """Steps whose buckets go through the collectives, although one rank needs none."""

    ours, theirs = params_on(part.device, 20, 3000), params_on(part.device, 20, 3000)
    with mock.patch.object(Communicators, "_make_among", return_value=collectives):
        optimizer = ShardedASGD(ours, **OPTIONS, stage=stage, bucket_cap_mb=0.05, foreach=True)
        oracle = torch.optim.ASGD(theirs, **OPTIONS, foreach=True)
        for step in range(5):
            for params, one in ((ours, optimizer), (theirs, oracle)):
                backward(params, step)
                one.step()
                one.zero_grad()
            if step == 3:
                backward(ours, step)
                optimizer.clip_grad_norm_(1.0)
                optimizer.zero_grad()
    part.wait()
    wrong = sum(not torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    name = "means" if collectives._averages else "sums"
    part.check(
        f"training, stage {stage}, {name} by the backend: bits of torch", not wrong, f"{wrong} parameters differ"
    )
