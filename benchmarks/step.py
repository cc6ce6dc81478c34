"""``python -m benchmarks.step``: time and memory of one training step, in comparison with other optimizers.

The program starts its own ranks. It prints one Markdown report on stdout, and its progress on stderr.
``benchmarks/README.md`` describes the method.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.imbalance import measure_imbalance
from benchmarks.measure import measure_memory, measure_time, progress, summarize_time
from benchmarks.model import Shape, build_model, parameter_bytes
from benchmarks.peers import PARALLEL, select_peers
from benchmarks.report import as_markdown, surroundings

PARTS = ("time", "memory", "imbalance")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; None stands for the arguments of this process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--world-size", type=int, default=2, help="ranks to start (2)")
    parser.add_argument("--rounds", type=int, default=None, help="timed rounds (25; 5 with --quick)")
    parser.add_argument("--warmup", type=int, default=None, help="rounds before them (5; 2 with --quick)")
    parser.add_argument("--batch", type=int, default=Shape.batch, help="sequences per rank (%(default)s)")
    parser.add_argument("--context", type=int, default=Shape.context, help="tokens per sequence (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the model, fewer peers and rounds")
    parser.add_argument("--peers", nargs="+", metavar="PEER", help=f"of {_keys()}")
    parser.add_argument("--parallel", choices=tuple(PARALLEL), default="ddp", help="which peers (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (all)")
    parser.add_argument("--scratch", default=None, help="folder that torch.save writes to (/dev/shm, else temporary)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all figures here")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="also write the report here")
    return parser.parse_args(arguments)


def _keys() -> str:
    return "; ".join(", ".join(peer.key for peer in peers) for peers in PARALLEL.values())


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the chosen parts, one after the other, and return all figures."""
    shape = Shape(context=options.context, batch=options.batch)
    if options.quick:
        shape = shape.tiny()
    peers = select_peers(options.peers, quick=options.quick, parallel=options.parallel)
    rounds = options.rounds or (5 if options.quick else 25)
    warmup = options.warmup if options.warmup is not None else (2 if options.quick else 5)
    scratch = options.scratch or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())
    report: dict[str, Any] = {"surroundings": surroundings()} | _workload(shape, options.world_size, rounds, warmup)
    report["workload"]["torch.save to"] = scratch
    report["quick"] = options.quick
    if options.quick:
        report["workload"]["note"] = "--quick: shows that it runs; its figures say little"
    if "imbalance" in options.parts and options.parallel == "ddp":
        progress("imbalance at other world sizes")
        report["imbalance"] = measure_imbalance(shape, ours=any(peer.ours for peer in peers))
    if "memory" in options.parts:
        report["memory"] = measure_memory(peers, shape, options.world_size)
    if "time" in options.parts:
        result = measure_time(peers, shape, options.world_size, rounds, warmup, scratch)
        report |= summarize_time(result) | {"raw": result}
    progress("")
    return report


def _workload(shape: Shape, world_size: int, rounds: int, warmup: int) -> dict[str, Any]:
    """The description of the workload, for the report."""
    model = build_model(shape)
    unit = parameter_bytes(model)
    num_tensors = len(list(model.parameters()))
    return {
        "parameter_bytes": unit,
        "workload": {
            "model": f"GPT, {unit / 4e6:.1f}M fp32 parameters in {num_tensors} tensors",
            "P, the parameters' bytes": f"{unit / 1e6:.1f} MB",
            "per rank and step": f"{shape.batch} x {shape.context} tokens",
            "world size": f"{world_size} ranks, Gloo, one compute thread each",
            "rounds": f"{rounds}, after {warmup} to warm up, all peers interleaved",
        },
    }


def main() -> None:
    """Measure, print the report, and write files if the command line asks for them."""
    options = parse_arguments()
    report = run(options)
    text = as_markdown(report)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
