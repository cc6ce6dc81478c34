"""``python -m benchmarks.checkpoint``: saves, loads and consolidates, in comparison with torch, in one run.

The program starts the ranks of all ways to keep checkpoints at once, and lets one way after the other save, load and
consolidate the same state, round after round. Then it measures the memory of each way in fresh processes. It prints
one Markdown report on stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.measure import MEMORY_ENVIRONMENT, progress, rotated
from benchmarks.model import Shape, build_model, parameter_bytes
from benchmarks.peers import HYPERPARAMETERS, consolidate, peer_of
from benchmarks.ranks import Team
from benchmarks.report import markdown_table, surroundings
from benchmarks.trainer import peak_bytes, reset_peak, settled_bytes

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
LABELS = {
    "ours": "dist_asgd (`stage=2`)",
    "zero": "`ZeroRedundancyOptimizer`, consolidated, `torch.save` on rank 0",
    "fsdp2": "FSDP2 + `torch.optim.ASGD`, `dcp`",
    "plain": "the same bytes: `write`, xxh3_128, `fsync`; copied once in memory",
}
CALLS = {
    "ours": ("save", "async_save", "load", "consolidate"),
    "zero": ("save", "load", "consolidate"),
    "fsdp2": ("save", "async_save", "load"),
    "plain": ("save", "async_save"),
}


class Checkpointer:
    """One rank of one way to keep checkpoints (``way``, a key of LABELS): the actor of a team.

    All public methods are collective. The methods that have the name of a call in CALLS are timed from outside.
    """

    def __init__(self, rank: int, world_size: int, way: str, shape: Shape, folder: str) -> None:
        self.rank, self.way = rank, way
        self.folder = Path(folder)
        self.model: torch.nn.Module = build_model(shape)
        self.unit = parameter_bytes(self.model)
        self.pending: Any = None
        warnings.simplefilter("ignore")
        if way == "fsdp2":
            fully_shard(self.model, mesh=init_device_mesh("cpu", (world_size,)))
            self.optimizer: torch.optim.Optimizer = torch.optim.ASGD(self.model.parameters(), **HYPERPARAMETERS)
        elif way == "plain":
            # This rank's part of the bytes of a checkpoint, which are those of the parameters and the averages.
            self.data = torch.randn(2 * self.unit // world_size // 4)
            self.staged = torch.zeros_like(self.data)
            return
        else:
            self.optimizer = peer_of("stage2" if way == "ours" else "zero").make_optimizer(self.model)
        for param in self.model.parameters():
            param.grad = torch.full_like(param, 0.01)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self, call: str, name: str) -> float:
        """The seconds from a barrier to the return of the method ``call``, which gets the path ``name``."""
        self.finish()
        if self.rank == 0 and call != "load":
            for old in self.folder.iterdir():
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        dist.barrier()
        begin = time.perf_counter()
        getattr(self, call)(self.folder / (name if call != "load" else "1"))
        return time.perf_counter() - begin

    def finish(self) -> None:
        """Wait for a save in the background, if there is one."""
        if self.pending is not None:
            (self.pending.wait if self.way == "ours" else self.pending.result)()
            self.pending = None

    def peak(self, call: str) -> int:
        """The peak of this rank's bytes in ``call`` above the bytes before it. A save in the background is included."""
        before = settled_bytes()
        reset_peak()
        self.timed(call, "1")
        self.finish()
        return peak_bytes() - before

    def save(self, path: Path) -> None:
        """Save model and optimizer; on return they are on disk."""
        if self.way == "ours":
            from dist_asgd import save_checkpoint

            save_checkpoint(path, self.model, self.optimizer, step=1)
        elif self.way == "fsdp2":
            model, optim = get_state_dict(self.model, self.optimizer, options=FLAT)
            state_dict_saver.save({"model": model, "optim": optim}, checkpoint_id=path)
        elif self.way == "zero":
            state = consolidate(self.optimizer)
            if self.rank == 0:
                with path.open("wb") as file:
                    torch.save({"model": self.model.state_dict(), "optim": state}, file)
                    os.fsync(file.fileno())
            dist.barrier()
        else:
            view, digest = self.data.numpy().data.cast("B"), xxhash.xxh3_128()
            with path.with_name(f"{path.name}-{self.rank}").open("wb", buffering=0) as raw:
                for start in range(0, len(view), 1 << 24):
                    raw.write(view[start : start + (1 << 24)])
                    digest.update(view[start : start + (1 << 24)])
                os.fsync(raw.fileno())
            dist.barrier()

    def async_save(self, path: Path) -> None:
        """Save in the background; on return training can go on."""
        if self.way == "ours":
            from dist_asgd import async_save_checkpoint

            self.pending = async_save_checkpoint(path, self.model, self.optimizer, step=1)
        elif self.way == "plain":
            # The shortest possible stall: one copy of all data into memory that is already allocated.
            self.staged.copy_(self.data)
        else:
            model, optim = get_state_dict(self.model, self.optimizer, options=FLAT)
            self.pending = state_dict_saver.async_save({"model": model, "optim": optim}, checkpoint_id=path)

    def load(self, path: Path) -> None:
        """Load what ``save`` has written."""
        if self.way == "ours":
            from dist_asgd import load_checkpoint

            load_checkpoint(path, self.model, self.optimizer)
        elif self.way == "fsdp2":
            model, optim = get_state_dict(self.model, self.optimizer, options=FLAT)
            state: dict[str, Any] = {"model": model, "optim": optim}
            state_dict_loader.load(state, checkpoint_id=path)
            set_state_dict(
                self.model, self.optimizer, model_state_dict=model, optim_state_dict=state["optim"], options=FLAT
            )
        else:
            content = torch.load(path, mmap=True)
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optim"])

    def consolidate(self, _path: Path) -> None:
        """Consolidate the optimizer's state on rank 0."""
        consolidate(self.optimizer)
        dist.barrier()


def measure_seconds(shape: Shape, world_size: int, rounds: int, scratch: Path) -> dict[str, dict[str, list[float]]]:
    """The seconds of each call in each round, by way and call; the slowest rank counts.

    In each round all ways take their turn, in an order that rotates. The first round warms up and does not count.
    """
    seconds: dict[str, dict[str, list[float]]] = {way: {call: [] for call in calls} for way, calls in CALLS.items()}
    with contextlib.ExitStack() as stack:
        teams = {}
        for way in CALLS:
            folder = scratch / way
            folder.mkdir()
            teams[way] = stack.enter_context(Team(Checkpointer, world_size, way, shape, str(folder)))
        for team in teams.values():
            team.wait_ready()
        for number in range(rounds + 1):
            progress(f"round {number} of {rounds}")
            for way in rotated(list(CALLS), number):
                for call in sorted(
                    CALLS[way], key=lambda call: ("async_save", "consolidate", "save", "load").index(call)
                ):
                    slowest = max(teams[way].call("timed", call, "1"))
                    teams[way].call("finish")
                    if number:
                        seconds[way][call].append(slowest)
    return seconds


def measure_peaks(shape: Shape, world_size: int, scratch: Path) -> dict[str, dict[str, int]]:
    """The peak of rank 0 in each call, in bytes, by way and call. Each way has fresh processes."""
    peaks: dict[str, dict[str, int]] = {}
    for way, calls in CALLS.items():
        if way == "plain":
            continue
        progress(f"memory of {way}")
        with Team(Checkpointer, world_size, way, shape, str(scratch / way), environment=MEMORY_ENVIRONMENT) as team:
            team.wait_ready()
            order = sorted(calls, key=("consolidate", "async_save", "save", "load").index)
            peaks[way] = {call: team.call("peak", call)[0] for call in order}
    return peaks


def report(options: argparse.Namespace, seconds: dict[str, Any], peaks: dict[str, Any], unit: int) -> str:
    """The report as Markdown. ``unit`` is P, the bytes of the parameters."""
    fields = {
        **surroundings("benchmarks.checkpoint"),
        "model": f"GPT, {unit / 4e6:.1f}M fp32 parameters; a checkpoint holds 2 P = {2 * unit / 1e6:.0f} MB",
        "world size": f"{options.world_size} ranks, Gloo, one compute thread each",
        "written to": "folder of temporary files" if options.scratch is None else "--scratch",
        "rounds": f"{options.rounds}, after 1 to warm up, all ways interleaved; medians, slowest rank",
    }
    names = ("save", "async_save", "load", "consolidate")
    titles = ("save", "async save: stall", "load", "consolidate")

    def row(way: str, cell: Callable[[str], str]) -> list[str]:
        return [LABELS[way], *(cell(name) if name in CALLS[way] else "" for name in names)]

    time_rows = [row(way, lambda name, way=way: f"{median(seconds[way][name]):.3f}") for way in CALLS]  # type: ignore[misc]
    peak_rows = [row(way, lambda name, way=way: f"{peaks[way][name] / unit:.2f}") for way in peaks]  # type: ignore[misc]
    ours = {name: median(seconds["ours"][name]) for name in CALLS["ours"]}
    plain = median(seconds["plain"]["save"])
    copied = median(seconds["plain"]["async_save"])
    goals = [
        ["save / plain write + hash + fsync", "<= 1.2", f"{ours['save'] / plain:.2f}"],
        ["async stall / save", "< 0.10", f"{ours['async_save'] / ours['save']:.3f}"],
        ["a copy in memory alone / save", "", f"{copied / ours['save']:.3f}"],
        ["async stall above a copy in memory", "", f"{1000 * (ours['async_save'] - copied):.0f} ms"],
        [
            "consolidate, peak of rank 0 above the result (1 P)",
            "<= 2 buckets",
            f"{peaks['ours']['consolidate'] / unit - 1:.2f} P",
        ],
    ]
    return "\n\n".join(
        [
            "# Benchmark: checkpoints",
            markdown_table(["field", "value"], [[key, value] for key, value in fields.items()]),
            "Seconds. `save` is on disk when it returns (`fsync`); ours is also hashed, and renamed into place.",
            markdown_table(["", *titles], time_rows),
            "Peak memory of rank 0 above what it held before the call, in units of P (the parameters' bytes). Async: "
            "until the checkpoint is on disk; what was staged is kept for the next time. Buckets are P / 20, but for "
            "the largest parameters (embedding and head: P / 10 each).",
            markdown_table(["", *titles], peak_rows),
            markdown_table(["to reach", "wanted", "measured"], goals),
        ]
    )


def main() -> None:
    """Measure, print the report, and write it to a file if the command line asks for it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("--world-size", type=int, default=2, help="ranks to start (2)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (%(default)s)")
    parser.add_argument("--layers", type=int, default=Shape.num_layers, help="transformer blocks (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the model, to see that it runs")
    parser.add_argument("--scratch", help="folder to write checkpoints in (default: that of temporary files)")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="also write the report here")
    options = parser.parse_args()
    shape = Shape(num_layers=options.layers)
    shape = shape.tiny() if options.quick else shape
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        seconds = measure_seconds(shape, options.world_size, options.rounds, Path(folder))
        peaks = measure_peaks(shape, options.world_size, Path(folder))
    progress("")
    text = report(options, seconds, peaks, parameter_bytes(build_model(shape)))
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
