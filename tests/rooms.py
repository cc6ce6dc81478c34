"""The rooms of ``dist_asgd`` and the direction between them: one table, which the docs show too.

``ROOMS`` runs from the bottom to the top. A room is a package of ``dist_asgd`` or a module at its root. The files of a
room import only from it and from rooms on lines above it.
"""

from pathlib import Path

import dist_asgd

PACKAGE = Path(dist_asgd.__file__).parent

# (rooms on one line, what happens to the data there)
ROOMS: list[tuple[tuple[str, ...], str]] = [
    (("version",), "the version"),
    (("labels",), "the names of phases in traces of torch's profiler"),
    (("storage",), "the flat memory of parameters and state: layout, buckets, memory order, masters, snapshots"),
    (("comm",), "collectives by backend, and the agreement of all ranks before a collective call"),
    (("placements",), "presharded parameters (DTensor, FSDP1), replica groups, fragments shown as tensors"),
    (("parts", "portions"), "the functions that files of users name; their paths never change"),
    (("update",), "the rule on this rank's shards: plan, implementations, kernels, schedule, scalars"),
    (("precision_checks",), "the dtypes of state and messages that the constructor accepts"),
    (("interruption",), "the errors of calls after one that was interrupted while it wrote"),
    (("backward_checks", "validation"), "what the constructor and add_param_group() accept"),
    (("gradients",), "gradients averaged by DDP or reduced here; clipping and loss scaling"),
    (("fingerprints", "gather", "memory", "state", "stats"), "what a step needs beside gradients and the update"),
    (("averaging_start",), "when averaging begins, for people, and how many iterates an average holds"),
    (
        ("averaging", "forward", "module_buffers", "state_dict"),
        "the averages in place of the parameters, with the buffers of modules; the forward that begins before gathers "
        "have ended; state dicts",
    ),
    (("joining",), "uneven inputs: what torch's Join calls on ranks that have no inputs left"),
    (("registry",), "the parameters that the optimizer was built for, beside those that param_groups hold now"),
    (
        ("backward_step", "step_context"),
        "the steps of step_in_backward=True, which backward begins; what the update in step() begins with",
    ),
    (("sharded_state",), "what ShardedASGD and ShardedAverage have in common: shards, averages in place, state dicts"),
    (("optimizer", "sharded_average"), "ShardedASGD; ShardedAverage, the average alone beside any optimizer"),
    (
        ("amp", "batch_statistics", "checkpoint", "trigger"),
        "the gradient scaler; BatchNorm's statistics; checkpoints on disk, export, and work on checkpoints offline; "
        "when averaging begins",
    ),
    (
        ("arguments", "console"),
        "the options that commands share; how commands print: tables, JSON, errors and exit statuses",
    ),
    (("listings",), "what inspect and diff print"),
    (
        ("average_command", "planning"),
        "dist-asgd average; bytes and traffic of each mode, before anything is built: plan()",
    ),
    (("__init__",), "the public names"),
    (("cli",), "the command line"),
    (("integrations",), "adapters for trainers, one module for each library"),
    (("__main__",), "python -m dist_asgd"),
]

LEVELS = {room: level for level, (rooms, _) in enumerate(ROOMS) for room in rooms}


def room_of(path: Path) -> str:
    """The room that a file of the package belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def table() -> str:
    """The rooms as a Markdown table, from the top to the bottom."""
    lines = ["| room | what happens there |", "|---|---|"]
    for rooms, what in reversed(ROOMS):
        names = ", ".join(f"`{name}/`" if (PACKAGE / name).is_dir() else f"`{name}.py`" for name in rooms)
        lines.append(f"| {names} | {what} |")
    return "\n".join(lines)
