"""The report of ``benchmarks.links``: measured steps beside the cost model's, and what is asked of both."""

from __future__ import annotations

from typing import Any

from benchmarks.hosts import NUM_HOSTS
from benchmarks.report import markdown_table

# The ratio that is asked for: of a stage 2 step at 1 Gbit/s.
GOAL, GOAL_GBIT = 0.4, 1.0
# How far the model may be off.
TOLERANCE = 0.2


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f}"


def as_markdown(report: dict[str, Any]) -> str:
    """The report: the links, the steps beside the model, and the figure that is asked for."""
    links = [
        [
            f"{entry['ranks']}",
            f"{entry['gbit']:g}",
            f"{entry['link_gbit']:.2f}",
            f"{entry['latency_us']:.0f}",
            f"{entry['node_gbit']:.1f}" if entry["ranks"] > NUM_HOSTS else "-",
            f"{entry['node_latency_us']:.0f}" if entry["ranks"] > NUM_HOSTS else "-",
            f"{entry['host_gbit']:.1f}",
        ]
        for entry in report["links"]
    ]
    steps = [
        [
            row["mode"],
            f"{row['ranks']}",
            f"{row['gbit']:g}",
            row["work"],
            _ms(row["compute"]),
            _ms(row["step"]),
            f"{row['spread']:.0%}",
            _ms(row["estimate"]),
            f"{row['error']:+.0%}" + ("" if abs(row["error"]) <= TOLERANCE else " **no**"),
            _ms(row["exposed"]),
            _ms(row["unoverlapped"]),
            "-" if row["share"] is None else f"{row['share']:.0%}",
        ]
        for row in report["rows"]
    ]
    within = sum(abs(row["error"]) <= TOLERANCE for row in report["rows"])
    asked = [row for row in report["rows"] if row["ranks"] == 2 and row["gbit"] == GOAL_GBIT and row["share"]]
    # Of the computations that were asked for, the one that takes about as long as the communication.
    nearest = min((abs(row["compute"] / row["unoverlapped"] - 1) for row in asked), default=0.0)
    equal = [row for row in asked if abs(row["compute"] / row["unoverlapped"] - 1) <= nearest + 0.1]
    shares = [f"{row['mode']} {row['share']:.0%}" for row in equal]
    return "\n".join(
        [
            "# Steps over rate-limited links, and the cost model beside them",
            "",
            f"{report['elements'] / 1e6:.1f}M fp32 parameters on two hosts, which are network namespaces of one "
            "machine, with one rank or two on each; milliseconds, medians of the slowest rank's steps.",
            "",
            "- *Computation* in milliseconds stands for an accelerator: layers that pause and leave the processor to "
            "the messages; a batch is a transformer that the processor itself trains.",
            "- *Compute* is forward and backward of all ranks at once without communication, and *exposed* is the step "
            "less compute.",
            "- *Unoverlapped* is `step()` on gradients that are already there: reduce, update and gather, with nothing "
            "beside them.",
            "- *Model* is what `dist_asgd.planning.timing`, on which the times of `dist-asgd plan` rest, says of the "
            "step, from the links below and from compute and update alone.",
            "",
            f"- The model is within {TOLERANCE:.0%} in {within} of {len(steps)} rows.",
            f"- Exposed over unoverlapped, on 2 ranks at {GOAL_GBIT:g} Gbit/s where computation and communication "
            f"take about as long: {', '.join(shares)}. Asked for: at most {GOAL:.0%}.",
            "",
            markdown_table(
                [
                    *("mode", "ranks", "Gbit/s", "computation", "compute", "step", "spread", "model", "off by"),
                    *("exposed", "unoverlapped", "exposed / unoverlapped"),
                ],
                steps,
            ),
            "",
            "The links that the model was given, which were measured before each mode's steps; these are the medians. "
            "Gloo's own messages measure them, of all ranks at once; *processor* is the rate at which one rank's share "
            "of a core passes messages on.",
            "",
            markdown_table(
                [
                    *("ranks", "cable, Gbit/s", "link, Gbit/s", "latency, us", "in a host, Gbit/s", "latency, us"),
                    "processor, Gbit/s",
                ],
                links,
            ),
            "",
            markdown_table(["", ""], [[name, value] for name, value in report["about"].items()]),
            "",
        ]
    )
