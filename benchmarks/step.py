"""``python -m benchmarks.step``: time and memory of one training step, in comparison with other libraries.

The program starts its own ranks. It prints one Markdown report on stdout, and its progress on stderr.
``benchmarks/README.md`` describes the method.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import step_pages, step_report
from benchmarks.hosts import Hosts
from benchmarks.imbalance import measure_imbalance
from benchmarks.measure import (
    Timer,
    available_bytes,
    batches,
    measure_memory,
    progress,
    reason,
    summarize,
    summarize_consolidation,
    team_bytes,
)
from benchmarks.model import MODELS, Shape, build_model, parameter_bytes
from benchmarks.peers import PEERS, Peer, select_peers
from benchmarks.report import surroundings
from benchmarks.settings import ALL, DEFAULT, Budget, Pace, Setting, groups_of

PARTS = ("time", "memory", "imbalance")
FIRST_ROUNDS, OTHER_ROUNDS = 15, 8


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; None stands for the arguments of this process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--settings",
        nargs="+",
        type=_settings,
        default=[_settings("usual")],
        metavar="MODEL/RANKS/LINK",
        help="models are gpt (31M parameters in 173 tensors) and wide (103M in two); a link is 'host', for ranks of "
        f"one host, or the Gbit/s between two, which needs root, ip and tc; 'all' stands for {' '.join(ALL)}; without "
        f"this option it is {' '.join(DEFAULT)}",
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time to fill with rounds (%(default)s)")
    parser.add_argument("--rounds", type=int, help=f"at most so many timed rounds ({FIRST_ROUNDS}, {OTHER_ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="a tenth of the GPT on 2 ranks of one host, four peers")
    parser.add_argument("--peers", nargs="+", metavar="PEER", help=f"of {', '.join(peer.key for peer in PEERS)}")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (all)")
    parser.add_argument("--scratch", default=None, help="folder that torch.save writes to (/dev/shm, else temporary)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all figures here")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="also write the report here")
    parser.add_argument("--picture", type=Path, metavar="PATH", help="also draw the figures here (.svg, .png)")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="write all three to benchmarks/results, and the tables in README.md and docs/benchmarks.md",
    )
    parser.add_argument("--from-json", type=Path, metavar="PATH", help="measure nothing: report these figures")
    options = parser.parse_args(arguments)
    if options.quick and options.publish:
        parser.error("--quick measures nothing that says much; leave it out with --publish")
    return options


def _settings(text: str) -> list[Setting]:
    """The settings of one argument."""
    try:
        return [Setting.parse(key) for key in {"usual": DEFAULT, "all": ALL}.get(text, (text,))]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the chosen parts in each setting, and return all figures."""
    begin = time.monotonic()
    settings = [Setting("gpt", 2)] if options.quick else [each for several in options.settings for each in several]
    peers = select_peers(options.peers, quick=options.quick)
    groups = groups_of(settings)
    report: dict[str, Any] = {"surroundings": surroundings(), "quick": options.quick, "settings": {}}
    if "imbalance" in options.parts:
        progress("imbalance at other world sizes")
        shape = Shape().tiny() if options.quick else Shape()
        report["imbalance"] = measure_imbalance(shape, ours=any(peer.ours for peer in peers))
    budget = Budget(60 * options.minutes - (time.monotonic() - begin), groups)
    hosts: Hosts | None = None
    with ExitStack() as stack:
        for group in groups:
            if group[0].link is not None and hosts is None:
                try:
                    hosts = stack.enter_context(Hosts())
                except (RuntimeError, OSError) as error:
                    report["no_hosts"] = reason(error)
                    break
            those = [peer for peer in peers if peer.least_ranks <= group[0].ranks]
            measurement = Measurement(options, group, those, report, hosts if group[0].link is not None else None)
            try:
                measurement.run(budget)
            except KeyboardInterrupt:
                report["interrupted"] = [setting.key for setting in group]
                break
            budget.end_group()
    progress("")
    report["surroundings"]["load average at end"] = f"{os.getloadavg()[0]:.1f}"
    report["surroundings"]["time taken"] = f"{time.monotonic() - begin:.0f} s"
    return report


class Measurement:
    """What is measured in the settings of one group; it goes to ``report["settings"]``, by the settings' keys."""

    def __init__(
        self,
        options: argparse.Namespace,
        group: Sequence[Setting],
        peers: Sequence[Peer],
        report: dict[str, Any],
        hosts: Hosts | None,
    ) -> None:
        self._options, self._group, self._peers, self._hosts = options, group, peers, hosts
        self._report = report
        self._first = not report["settings"]
        shape = MODELS[group[0].model]
        self._shape = shape.tiny() if options.quick else shape
        model = build_model(self._shape)
        self._unit = parameter_bytes(model)
        self._figures: dict[str, dict[str, Any]] = {
            setting.key: {
                "parameter_bytes": self._unit,
                "num_parameters": len(list(model.parameters())),
                "input": self._shape.input(),
                "failures": {},
                "time": {},
                "raw": [],
            }
            for setting in group
        }

    def run(self, budget: Budget) -> None:
        """Measure memory and time, as far as they are asked for."""
        deadline = budget.next_deadline()
        memory: dict[str, Any] = {}
        failures: dict[str, str] = {}
        if "memory" in self._options.parts and self._hosts is None:
            # What torch loads at first use is the same in every setting.
            memory = measure_memory(self._peers, self._group[0], self._shape, self._first, failures)
            self._figures[self._group[0].key]["memory"] = memory
        if "time" in self._options.parts:
            self._time(deadline, memory or self._memory_on_host(), failures)
        for figures in self._figures.values():
            figures["failures"] = failures
        self._report["settings"] |= self._figures

    def _memory_on_host(self) -> dict[str, Any]:
        """The memory of the same ranks without a link, if it was measured."""
        setting = Setting(self._group[0].model, self._group[0].ranks)
        found: dict[str, Any] = self._report["settings"].get(setting.key, {}).get("memory", {})
        return found

    def _time(self, deadline: float, memory: dict[str, Any], failures: dict[str, str]) -> None:
        sizes = team_bytes(self._peers, self._group[0].ranks, self._unit, memory)
        together = batches(self._peers, sizes, available_bytes())
        for number, batch in enumerate(together):
            # From the start of the teams on.
            now = time.monotonic()
            share = now + max(0.0, deadline - now) / (len(together) - number)
            most = self._options.rounds or (FIRST_ROUNDS if self._first else OTHER_ROUNDS)
            warmup, least = (3, 5) if self._first else (1, 3)
            with Timer(batch, self._group, self._shape, self._hosts, failures) as timer:
                timer.run(Pace(warmup, min(least, most), most, share), split_every=1 if self._first else 2)
                for key, raw in timer.raw.items():
                    # The baseline's figures are those of the first batch; ratios are always to those of their own.
                    self._figures[key]["time"] = summarize(raw) | self._figures[key]["time"]
                    self._figures[key]["raw"].append(raw)
                if self._first and number == 0:
                    consolidation = summarize_consolidation(timer.consolidation(self._scratch()))
                    self._report["consolidation"] = consolidation | {"torch.save to": self._scratch()}

    def _scratch(self) -> str:
        if self._options.scratch:
            return str(self._options.scratch)
        return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


def main() -> None:
    """Measure, print the report, and write files if the command line asks for them."""
    options = parse_arguments()
    # Ended from outside, it still removes its hosts, ends its ranks, and reports the settings that are complete.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Rounded before anything is written, so that pages and the file of figures agree to the last digit.
    report = json.loads(options.from_json.read_text()) if options.from_json else step_pages.rounded(run(options))
    if not report["settings"]:
        why = report.get("no_hosts", "interrupted before the first setting was complete")
        sys.exit(f"no setting has figures: {why}; the setting gpt/2/host needs one host and no rights")
    print(step_report.as_markdown(report))
    step_pages.write(report, options.markdown, options.json, options.picture)
    if options.publish:
        step_pages.publish(report)


if __name__ == "__main__":
    main()
