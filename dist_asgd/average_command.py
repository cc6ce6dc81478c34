"""``dist-asgd average``: reads the command line, has checkpoints averaged, and prints what was written."""

from __future__ import annotations

from typing import Annotated

import typer

from .arguments import (
    GIGABYTE,
    AsJson,
    AverageName,
    ExportDtype,
    Force,
    MaxShardGb,
    OutSafetensors,
    Prefix,
    TiesByValue,
    Verify,
    torch_dtype,
)
from .checkpoint.format.layouts import prefix_of_text
from .checkpoint.format.paths import as_path
from .checkpoint.format.safetensors import DEFAULT_MAX_BYTES, check_out
from .checkpoint.offline.average import plan_average
from .checkpoint.offline.between import plan_between
from .checkpoint.offline.combination import Merge
from .checkpoint.offline.merge import open_sources, write_merge
from .console import encodable, plain, print_written, printing, progress_bar, reported

_MAX_LISTED = 12


def average(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR",
            help="Checkpoints, or folders of checkpoints: a folder stands for its checkpoints in the order of steps.",
            show_default=False,
        ),
    ],
    out: OutSafetensors,
    weights: Annotated[
        str,
        typer.Option(
            metavar="W1,W2,...",
            help="The weight of each checkpoint, in their order; they need no sum of 1. Default: all alike.",
            show_default=False,
        ),
    ] = "",
    last: Annotated[bool, typer.Option("--last", help="Average the last iterates instead of the averages.")] = False,
    name: AverageName = None,
    ema: Annotated[
        float | None,
        typer.Option(
            metavar="DECAY",
            help="An exponential moving average over the checkpoints in their order: value <- DECAY * value + "
            "(1 - DECAY) * next.",
            show_default=False,
        ),
    ] = None,
    between: Annotated[
        bool,
        typer.Option(
            "--between",
            help="The mean of the iterates between two checkpoints of a run, the earlier one first, from their "
            "averages.",
        ),
    ] = False,
    latest: Annotated[
        int | None,
        typer.Option(metavar="K", help="Take only the last K of the checkpoints.", min=1, show_default=False),
    ] = None,
    dtype: ExportDtype = None,
    max_shard_gb: MaxShardGb = DEFAULT_MAX_BYTES / GIGABYTE,
    ties_by_value: TiesByValue = True,
    verify: Verify = True,
    prefix: Prefix = "",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Average the weights of several checkpoints, as safetensors.

    What is averaged of a checkpoint is what `export` would write of it: the average `ax` of each parameter, or with
    `--last` its last iterate. Any number of ranks, in any mode, may have written each checkpoint. Sums are formed in
    float64. Buffers are copied from the last checkpoint, so recompute statistics of BatchNorm.

    The latest 5 checkpoints of a run (LAWA):
    `dist-asgd average --last --latest 5 run/checkpoints lawa.safetensors`

    Several runs, one counting double (a model soup):
    `dist-asgd average --weights 1,1,2 a/latest b/latest c/latest soup.safetensors`

    The iterates between two checkpoints of a run whose averaging goes on:
    `dist-asgd average --between run/step-00002000 run/step-00003000 third.safetensors`
    """
    with reported():
        to = as_path(out)
        # Before checkpoints are read, which takes longer than to see that OUT is a checkpoint or was left out.
        check_out(to, force)
        merge = _merge(sources, weights, last, name, ema, between, latest, dtype, ties_by_value, verify, prefix)
        with progress_bar("averaging", merge.total_bytes) as progress:
            max_bytes = int(max_shard_gb * GIGABYTE)
            paths = write_merge(merge, to, max_bytes=max_bytes, overwrite=force, progress=progress)
    counts = {"tensors": len(merge.tensors), "combined": merge.num_combined, "averages": merge.num_averages}
    with printing():
        if not as_json:
            typer.echo(encodable(plain(_described(merge))))
        print_written(paths, as_json, counts, **merge.facts)
    for note in merge.notes:
        typer.echo(plain(f"note: {note}"), err=True)


def _merge(
    sources: list[str],
    weights: str,
    last: bool,
    name: str | None,
    ema: float | None,
    between: bool,
    latest: int | None,
    dtype: ExportDtype,
    ties_by_value: bool,
    verify: bool,
    prefix: str,
) -> Merge:
    """Plan what the options ask for; ValueError if they do not go together."""
    if not between:
        read = prefix_of_text(prefix)
        opened = open_sources(sources, latest=latest, last=last, average=name, verify=verify, prefix=read)
        given = _numbers(weights) if weights else None
        return plan_average(
            opened, weights=given, decay=ema, last=last, dtype=torch_dtype(dtype), ties_by_value=ties_by_value
        )
    others = {"--weights": weights, "--last": last, "--ema": ema is not None, "--latest": latest}
    for option, is_given in others.items():
        if is_given:
            raise ValueError(
                f"dist_asgd: {option} cannot be combined with --between, whose result follows from the two averages "
                f"and their numbers of iterates. Leave out one of the two."
            )
    opened = open_sources(sources, average=name, verify=verify, prefix=prefix_of_text(prefix))
    if len(opened) != 2:
        raise ValueError(
            f"dist_asgd: --between wants two checkpoints of a run, the earlier one first, and then OUT; got "
            f"{len(opened)} checkpoint{'s' * (len(opened) != 1)}."
        )
    return plan_between(*opened, dtype=torch_dtype(dtype), ties_by_value=ties_by_value)


def _numbers(text: str) -> list[float]:
    """The numbers of ``--weights``."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"dist_asgd: --weights must be numbers with commas between them, got {text!r}.") from None


def _described(merge: Merge) -> str:
    """One line about what was combined."""
    facts = merge.facts
    names = ["?" if step is None else str(step) for step in facts["steps"]]
    shown = ", ".join(names[:_MAX_LISTED]) + (f", ... {names[-1]}" if len(names) > _MAX_LISTED else "")
    if facts["rule"] == "between":
        least, most = facts["iterates"]
        count = f"{least:g}" if least == most else f"{least:g} to {most:g}"
        return f"mean of the {count} iterates between steps {names[0]} and {names[1]}"
    weights = facts["weights"]
    how = f", decay {facts['decay']:g}" if facts["rule"] == "ema" else ""
    if not how and len(set(weights)) > 1:
        how = ", weights " + ", ".join(f"{weight:.4g}" for weight in weights[:_MAX_LISTED])
        how += ", ..." * (len(weights) > _MAX_LISTED)
    kind = "EMA" if facts["rule"] == "ema" else "mean"
    many = "s" * (len(names) != 1)
    return f"{kind} of the {facts['of']} of {len(names)} checkpoint{many} (step{many} {shown}{how})"
