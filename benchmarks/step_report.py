"""The report of ``benchmarks.step``: a table of all settings at a glance, then the figures of each setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.peers import PEERS, peer_of
from benchmarks.report import markdown_table
from benchmarks.settings import Setting
from benchmarks.targets import Target, targets

MB = 1e6
NOTHING = "–"
MODEL_NAMES = {"gpt": "GPT", "wide": "two layers"}


def as_markdown(report: Mapping[str, Any]) -> str:
    """The whole report, with a table for everything that was measured."""
    sections = ["# Benchmark: one training step", _fields(report["surroundings"])]
    if report["quick"]:
        sections.append("`--quick` shows that the benchmark runs; its figures say little.")
    sections += [
        "## At a glance",
        # The picture beside step.md is of a whole report, with memory.
        *([_PICTURE] if any(figures.get("memory") for figures in report["settings"].values()) else []),
        glance(report),
        _GLANCE_NOTE.format(models=_models(report)),
        *_absent(report),
    ]
    goals = [] if report["quick"] else list(targets(report))
    if goals:
        sections += ["## Goals", _goals_table(goals), _GOALS_NOTE]
    for number, (key, figures) in enumerate(report["settings"].items()):
        sections += [f"## {title(Setting.parse(key))}", *_setting(figures, with_notes=number == 0)]
    if "consolidation" in report:
        sections += ["## Consolidating the state to rank 0", _consolidation_table(report)]
    if "imbalance" in report:
        sections += ["## Imbalance at other world sizes", _imbalance_table(report["imbalance"])]
    return "\n\n".join(sections) + "\n"


def title(setting: Setting) -> str:
    """The name of a setting in headings and in the picture."""
    where = "one host" if setting.link is None else f"{setting.link:g} Gbit/s between two hosts"
    return f"{MODEL_NAMES[setting.model]}, {setting.ranks} ranks, {where}"


def keys_of(report: Mapping[str, Any]) -> list[str]:
    """The keys of the peers that have figures or a failure in any setting, in the order of the table."""
    named = {
        key
        for figures in report["settings"].values()
        for part in ("time", "memory", "failures")
        for key in figures.get(part, {})
    }
    return [peer.key for peer in PEERS if peer.key in named]


def peak(figures: Mapping[str, Any], key: str, floor: str = "warm", kind: str = "steps") -> float | None:
    """A peer's peak above a floor in units of P, on the rank with the most; None if it was not measured."""
    ranks = figures.get("memory", {}).get(key, {}).get(kind, [])
    if not ranks or floor not in ranks[0]:
        return None
    highest: float = max(rank[floor] for rank in ranks) / figures["parameter_bytes"]
    return highest


def glance(report: Mapping[str, Any], only: Sequence[str] = ()) -> str:
    """One line for each peer: the ratio of a step's time in each setting, and the peak memory of the first.

    ``only`` are keys of settings; none stands for all.
    """
    settings = {Setting.parse(key): f for key, f in report["settings"].items() if key in (only or report["settings"])}
    first, figures_of_first = next(iter(settings.items()))
    header = ["time of a step", *map(_column, settings), f"memory, {_column(first)}"]
    rows = []
    for key in keys_of(report):
        times = [figures["time"].get(key, {}).get("whole_ratio") for figures in settings.values()]
        memory = peak(figures_of_first, key)
        row = [peer_of(key).label.replace("torch.optim.ASGD", "`torch.optim.ASGD`")]
        row += [NOTHING if time is None else f"{time:.2f}" for time in times]
        rows.append([*row, NOTHING if memory is None else f"{memory:.2f} P"])
    return markdown_table(header, rows)


def _column(setting: Setting) -> str:
    where = "" if setting.link is None else f", {setting.link:g} Gbit/s"
    return f"{MODEL_NAMES[setting.model]}, {setting.ranks} ranks{where}"


_GOALS_NOTE = "The report of `benchmarks.floor` has what a machine allows: for the peaks no less than the goals."
_PICTURE = "![Bars of the times of a step and of the peak memory of all peers](step.svg)"
_GLANCE_NOTE = """Times are medians of the slowest rank's whole step, over those of the first line in the same rounds. \
*memory* is the
peak above the bare model without what torch loads at first use, in units of P, the parameters' bytes. Ranks are on one
host if no link is named; Gbit/s are those of a cable between two hosts, which are network namespaces.

{models}"""


def _models(report: Mapping[str, Any]) -> str:
    """The models of the settings, one line each."""
    by_model = {Setting.parse(key).model: figures for key, figures in report["settings"].items()}
    return "\n".join(
        f"- *{MODEL_NAMES[model]}*: {f['parameter_bytes'] / 4e6:.1f}M fp32 parameters in {f['num_parameters']} "
        f"tensors, P = {f['parameter_bytes'] / MB:.1f} MB; {f['input']} per rank and step"
        for model, f in by_model.items()
    )


def _absent(report: Mapping[str, Any]) -> Iterator[str]:
    """Why peers or settings have no figures."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for setting, figures in report["settings"].items():
        for key, why in figures["failures"].items():
            reasons.setdefault((key, why), []).append(setting)
    lines = [
        f"- {peer_of(key).label}: `{why}`"
        + ("" if len(settings) == len(report["settings"]) else f" ({', '.join(settings)})")
        for (key, why), settings in reasons.items()
    ]
    if "no_hosts" in report:
        lines.append(f"- Links between hosts: `{report['no_hosts']}`")
    if "interrupted" in report:
        lines.append(f"- {', '.join(report['interrupted'])} and the settings after that: interrupted")
    if lines:
        yield "Not measured, with the error that said so:\n\n" + "\n".join(lines)


def _fields(values: Mapping[str, str]) -> str:
    return markdown_table(["field", "value"], [[name, str(value)] for name, value in values.items()])


def _goals_table(goals: Sequence[Target]) -> str:
    return markdown_table(
        ["what", "goal", "measured", "met"],
        [[goal.what, goal.goal, goal.measured, "yes" if goal.met else "**no**"] for goal in goals],
    )


def _setting(figures: Mapping[str, Any], with_notes: bool) -> Iterator[str]:
    """The tables of one setting. The first one's explain their columns."""
    if figures["time"]:
        yield _time_table(figures["time"])
        if with_notes:
            yield _TIME_NOTE
    table = _bytes_table(figures)
    if table:
        yield table
        if with_notes:
            yield _BYTES_NOTE


def _time_table(time: Mapping[str, Any]) -> str:
    def of(t: Mapping[str, Any], name: str, form: str, factor: float = 1.0) -> str:
        return f"{t[name] * factor:{form}}" if name in t else NOTHING

    rows = [
        [
            peer_of(key).label,
            of(t, "whole_seconds", ".0f", 1e3),
            f"**{t['whole_ratio']:.2f}**",
            of(t, "whole_round_ratio", ".2f"),
            of(t, "whole_least_ratio", ".2f"),
            of(t, "whole_spread", ".0%"),
            f"{t['whole_rounds']}",
            of(t, "processor_seconds", ".0f", 1e3),
            of(t, "processor_ratio", ".2f"),
            of(t, "step_seconds", ".1f", 1e3),
            of(t, "step_ratio", ".2f"),
            "yes" if t["same_bits"] else "no",
        ]
        for key, t in _in_order(time)
    ]
    return markdown_table(
        [
            "peer",
            "whole step (ms)",
            "ratio",
            "ratio by round",
            "ratio of least",
            "spread",
            "rounds",
            "processor (ms)",
            "ratio",
            "`opt.step()` (ms)",
            "ratio",
            "same bits",
        ],
        rows,
    )


_TIME_NOTE = """Medians over the rounds of the slowest rank's time; *ratio*: of the medians, to the first
line's; *ratio by round*: the median of each round's ratio; *ratio of least*: of the fastest
steps; *spread*: interquartile range over median; *processor*: time of all threads of a rank, which
other work on the machine disturbs less; *same bits*: the parameters end bit for bit as the first
line's; of more than two ranks' gradients there are sums in several orders. `opt.step()` is timed from
a barrier after backward. If not all peers fit in memory at once, the first line has been measured with
each batch of them, and ratios are to that."""


def _in_order(by_key: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(peer.key, by_key[peer.key]) for peer in PEERS if peer.key in by_key]


def _bytes_table(figures: Mapping[str, Any]) -> str:
    unit, memory = figures["parameter_bytes"], figures.get("memory", {})
    rows = []
    for key in keys_of({"settings": {"": figures}}):
        t = figures["time"].get(key)
        if t is None and key not in memory:
            continue
        row = [peer_of(key).label]
        for kind in ("state", "gradients"):
            if t is None:
                row += [NOTHING] * 3
            else:
                held = t[f"{kind}_bytes"]
                row += [f"{held / MB:.2f}", f"{held / unit:.4f}", f"{t[f'{kind}_imbalance']:.4f}"]
        peaks = [peak(figures, key), peak(figures, key, "cold"), peak(figures, key, kind="wrap")]
        rows.append([*row, *(NOTHING if value is None else f"{value:.2f}" for value in peaks)])
    return markdown_table(
        [
            "peer",
            *("state (MB)", "of P", "max/mean", "gradients (MB)", "of P", "max/mean"),
            *("peak (P)", "with torch's own (P)", "peak of construction (P)"),
        ],
        rows,
    )


_BYTES_NOTE = """*state* and *gradients*: distinct storages between backward and step, on the rank with the most.
State is what an optimizer or its library keeps beside parameters and gradients; gradients are what backward left
behind: `p.grad`, DDP's buckets where they are beside it (no views), and reduced shards. *peak*: resident memory in five
steps above the process that holds the bare model, in units of the parameters' bytes, on the rank with the most, after
the same process has trained and dropped a miniature, so that code which torch loads on first use is not counted; *with
torch's own*: above the same process before the miniature. *Construction* is that of wrapping and optimizer."""


def _consolidation_table(report: Mapping[str, Any]) -> str:
    found = report["consolidation"]
    figures = next(iter(report["settings"].values()))
    unit = figures["parameter_bytes"]
    what = f"`torch.save` of the state to {found['torch.save to']} ({PEERS[0].label})"
    rows = [[what, f"{found['save_seconds'] * 1e3:.0f}", "1.0", "", ""]]
    for key, seconds in _in_order(found["seconds"]):
        peaks = figures.get("memory", {}).get(key, {}).get("consolidation", [])
        memory = [f"{peaks[0] / unit:.3f}", f"{max(peaks[1:]) / unit:.3f}"] if peaks else ["", ""]
        rows.append([peer_of(key).label, f"{seconds * 1e3:.0f}", f"**{found['ratios'][key]:.1f}**", *memory])
    return markdown_table(["what", "ms", "ratio", "extra memory, target (P)", "extra memory, others (P)"], rows)


def _imbalance_table(table: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
    rows = []
    for key, sizes in table.items():
        rows.append([peer_of(key).label, *(f"{v['overhead']:.4f}" for v in sizes.values())])
    sizes = next(iter(table.values()))
    return markdown_table(["largest state over an exact N-th", *(f"{n} ranks" for n in sizes)], rows)
