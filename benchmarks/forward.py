"""``python -m benchmarks.forward``: training with ``overlap_forward()`` beside training without it.

Teams of ranks take turns, a few steps in a row each, from a barrier until the parameters of the last step have
arrived: what is still on its way when ``step()`` returns counts for the team that has sent it. The report has medians
over rounds and the quartiles of the ratios, each of two turns that came one after the other.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from benchmarks.measure import progress
from benchmarks.model import Shape, build_model, parameter_bytes
from benchmarks.peers import Peer, peer_of
from benchmarks.ranks import Team
from benchmarks.report import markdown_table, surroundings
from benchmarks.trainer import Trainer

STEPS_IN_A_ROW = 4
PARTS = ("forward", "backward", "step()", "all of it")


def _overlapping(model: nn.Module, key: str) -> Optimizer:
    from dist_asgd import ShardedASGD

    optimizer = peer_of(key).make_optimizer(model)
    assert isinstance(optimizer, ShardedASGD)
    optimizer.overlap_forward(model)
    return optimizer


def pair(key: str) -> tuple[Peer, Peer]:
    """The peer with this key, and the same with the overlap."""
    peer = peer_of(key)
    return peer, replace(peer, make_optimizer=partial(_overlapping, key=key))


class Turn(Trainer):
    """A ``Trainer`` that times steps in a row."""

    def turn(self) -> list[float]:
        """Take steps; returns the seconds of one by the parts of ``PARTS``, on average."""
        dist.barrier()
        seconds = [0.0] * len(PARTS)
        begin = time.perf_counter()
        for _ in range(STEPS_IN_A_ROW):
            tokens = self._next_batch()
            marks = [time.perf_counter()]
            loss = self.wrapped(tokens)
            marks.append(time.perf_counter())
            loss.backward()
            marks.append(time.perf_counter())
            self.optimizer.step()
            marks.append(time.perf_counter())
            self.optimizer.zero_grad()
            for part in range(3):
                seconds[part] += marks[part + 1] - marks[part]
        self.optimizer.wait_for_parameters()  # type: ignore[attr-defined]
        seconds[3] = time.perf_counter() - begin
        return [value / STEPS_IN_A_ROW for value in seconds]


def measure(key: str, shape: Shape, num_rounds: int) -> list[list[str]]:
    """The rows of the table for one peer, without and with the overlap, on 2 ranks."""
    without, overlapping = pair(key)
    # In memory that ranks share nothing overlaps: messages are what is measured.
    messages = {"DIST_ASGD_SHARED_MEMORY": "0"}
    with (
        Team(Turn, 2, without, shape, environment=messages) as one,
        Team(Turn, 2, overlapping, shape, environment=messages) as other,
    ):
        for team in (one, other):
            team.wait_ready()
            team.call("turn")
        turns: list[tuple[list[float], list[float]]] = []
        for number in range(num_rounds):
            progress(f"{key}, round {number + 1} of {num_rounds}")
            order = (one, other) if number % 2 else (other, one)
            found = {id(team): [max(values) for values in zip(*team.call("turn"), strict=True)] for team in order}
            turns.append((found[id(one)], found[id(other)]))
        same = one.call("parameters_digest") == other.call("parameters_digest")
    rows = []
    for part, name in enumerate(PARTS):
        before, after = ([turn[which][part] for turn in turns] for which in (0, 1))
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        figures = [f"{1e3 * median(before):.1f} ms", f"{1e3 * median(after):.1f} ms"]
        rows.append([f"{without.label}: {name}", *figures, f"{median(ratios):.2f}", f"{low:.2f} to {high:.2f}"])
    rows[-1][0] += "" if same else " (other bits!)"
    return rows


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forward", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="rounds (%(default)s)")
    parser.add_argument("--batch", type=int, default=Shape.batch, help="sequences per rank (%(default)s)")
    parser.add_argument("--context", type=int, default=128, help="tokens per sequence (%(default)s)")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="also write the report here")
    options = parser.parse_args()
    shape = Shape(context=options.context, batch=options.batch)
    fields = surroundings("benchmarks.forward")
    fields["model"] = f"{parameter_bytes(build_model(shape)) / 4e6:.1f}M float32 parameters"
    fields["batch on each of 2 ranks"] = f"{shape.batch} x {shape.context} tokens"
    rows = [row for key in ("stage1-views", "stage2") for row in measure(key, shape, options.rounds)]
    progress("")
    header = ["", "without", "with overlap_forward()", "ratio", "quartiles of the ratio"]
    lines = ["# Parameters that travel while the forward runs", "", *(f"- {k}: {v}" for k, v in fields.items()), ""]
    text = "\n".join([*lines, markdown_table(header, rows)]) + "\n"
    print(text)
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
