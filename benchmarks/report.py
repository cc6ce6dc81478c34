"""Describes the machine that a benchmark ran on, and formats the figures as Markdown tables."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import peer_of
from benchmarks.targets import Target, targets

MB = 1e6


def surroundings(module: str = "benchmarks.step") -> dict[str, str]:
    """Hardware, versions, commit, command and date of this run, by the names in the report."""
    return {
        "processor": _first_value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "commit": _commit(),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load average at start": f"{os.getloadavg()[0]:.1f}",
    }


def _first_value(path: str, name: str) -> str:
    if not Path(path).exists():
        return ""
    lines = Path(path).read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def _memory() -> str:
    kib = _first_value("/proc/meminfo", "MemTotal").split()
    return f"{int(kib[0]) / 2**20:.0f} GiB" if kib else "unknown"


def _commit() -> str:
    """The commit of this working tree, and whether the package has uncommitted changes."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "../dist_asgd")
    return (git("rev-parse", "--short", "HEAD") or "none") + (" with changes" if changed else "")


def as_markdown(report: Mapping[str, Any]) -> str:
    """The whole report of ``benchmarks.step``, with a table for everything that was measured."""
    sections = ["# Benchmark: one training step", _fields({**report["surroundings"], **report["workload"]})]
    goals = [] if report["quick"] else list(targets(report))
    if goals:
        sections += ["## Goals", _goals_table(goals)]
    if "time" in report:
        sections += ["## Time", _time_table(report["time"]), "## Bytes held by a rank", _bytes_table(report)]
    if "memory" in report:
        sections += ["## Peak memory above the model", _memory_table(report)]
    if "time" in report:
        sections += ["## Consolidating the state to rank 0", _consolidation_table(report)]
    if "imbalance" in report:
        sections += ["## Imbalance at other world sizes", _imbalance_table(report["imbalance"])]
    return "\n\n".join(sections) + "\n"


def _fields(values: Mapping[str, str]) -> str:
    return markdown_table(["field", "value"], [[name, str(value)] for name, value in values.items()])


def _goals_table(goals: Sequence[Target]) -> str:
    return markdown_table(
        ["what", "goal", "measured", "met"],
        [[goal.what, goal.goal, goal.measured, "yes" if goal.met else "**no**"] for goal in goals],
    )


def _time_table(time: Mapping[str, Any]) -> str:
    rows = [
        [
            peer_of(key).label,
            f"{t['whole_seconds'] * 1e3:.0f}",
            f"**{t['whole_ratio']:.2f}**",
            f"{t['whole_round_ratio']:.2f}",
            f"{t['whole_least_ratio']:.2f}",
            f"{t['whole_spread']:.0%}",
            f"{t['processor_seconds'] * 1e3:.0f}",
            f"{t['processor_ratio']:.2f}",
            f"{t['step_seconds'] * 1e3:.1f}",
            f"{t['step_ratio']:.2f}",
            f"{t['step_round_ratio']:.2f}",
            "yes" if t["same_bits"] else "no",
        ]
        for key, t in time.items()
    ]
    return (
        markdown_table(
            [
                "peer",
                "whole step (ms)",
                "ratio",
                "ratio by round",
                "ratio of least",
                "spread",
                "processor (ms)",
                "ratio",
                "`opt.step()` (ms)",
                "ratio",
                "ratio by round",
                "same bits",
            ],
            rows,
        )
        + "\n\nMedians over the rounds of the slowest rank's time; *ratio*: of the medians, to the first"
        "\nline's; *ratio by round*: the median of each round's ratio; *ratio of least*: of the fastest"
        "\nsteps; *spread*: interquartile range over median; *processor*: time of all threads of a rank, which"
        "\nother work on the machine disturbs less; *same bits*: the parameters end bit for bit as the first"
        "\nline's. `opt.step()` is timed from a barrier after backward."
    )


def _bytes_table(report: Mapping[str, Any]) -> str:
    unit = report["parameter_bytes"]
    rows = [
        [
            peer_of(key).label,
            f"{t['state_bytes'] / MB:.2f}",
            f"{t['state_bytes'] / unit:.4f}",
            f"{t['state_imbalance']:.4f}",
            f"{t['gradients_bytes'] / MB:.2f}",
            f"{t['gradients_bytes'] / unit:.4f}",
            f"{t['gradients_imbalance']:.4f}",
        ]
        for key, t in report["time"].items()
    ]
    return (
        markdown_table(
            ["peer", "state (MB)", "of P", "max/mean", "gradients (MB)", "of P", "max/mean"],
            rows,
        )
        + "\n\nDistinct storages between backward and step, on the rank with the most. *gradients* counts"
        "\nwhat backward left behind: `p.grad`, DDP's buckets where they are beside it (no views), and stage"
        "\n2's reduced shards."
    )


def _memory_table(report: Mapping[str, Any]) -> str:
    unit = report["parameter_bytes"]

    def most(ranks: Sequence[Mapping[str, int]], floor: str) -> str:
        return f"{max(rank[floor] for rank in ranks) / unit:.2f}"

    rows = [
        [
            peer_of(key).label,
            f"**{most(m['steps'], 'cold')}**",
            most(m["steps"], "warm"),
            most(m["wrap"], "warm"),
        ]
        for key, m in report["memory"].items()
    ]
    return (
        markdown_table(["peer", "peak of 5 steps (P)", "without torch's own (P)", "peak of construction (P)"], rows)
        + "\n\nResident memory above the process that holds the bare model, in units of the parameters'"
        "\nbytes, on the rank with the most. *without torch's own*: above the same process after training and"
        "\ndropping a miniature, so that code which torch loads on first use is not counted; construction"
        "\nlikewise."
    )


def _consolidation_table(report: Mapping[str, Any]) -> str:
    unit = report["parameter_bytes"]
    save = report["save_seconds"]
    rows = [
        [f"`torch.save` of the state ({peer_of(next(iter(report['time']))).label})", f"{save * 1e3:.0f}", "1.0", "", ""]
    ]
    for key, t in report["time"].items():
        if "consolidation_seconds" not in t:
            continue
        peaks = report.get("memory", {}).get(key, {}).get("consolidation", [])
        memory = [f"{peaks[0] / unit:.3f}", f"{max(peaks[1:]) / unit:.3f}"] if peaks else ["", ""]
        seconds = t["consolidation_seconds"]
        rows.append([peer_of(key).label, f"{seconds * 1e3:.0f}", f"**{t['consolidation_ratio']:.1f}**", *memory])
    return markdown_table(["what", "ms", "ratio", "extra memory, target (P)", "extra memory, others (P)"], rows)


def _imbalance_table(table: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
    rows = []
    for key, sizes in table.items():
        rows.append([peer_of(key).label, "max/mean", *(f"{v['imbalance']:.4f}" for v in sizes.values())])
        rows.append([peer_of(key).label, "max over an exact N-th", *(f"{v['overhead']:.4f}" for v in sizes.values())])
    sizes = next(iter(table.values()))
    return markdown_table(["peer", "bytes of state", *(f"{n} ranks" for n in sizes)], rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text, too. All columns but the first are figures."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([line(header), line(rule), *(line(row) for row in rows)])
