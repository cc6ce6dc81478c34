"""The arguments and options that commands share; ``cli.py`` and ``average_command.py`` use them."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import torch
import typer

GIGABYTE = 1_000_000_000


class Dtype(StrEnum):
    """A dtype that an export can be converted to."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def torch_dtype(dtype: Dtype | None) -> torch.dtype | None:
    """Return torch's dtype of that name; None for None."""
    return None if dtype is None else getattr(torch, dtype.value)


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="Check every byte that is read against manifest.json. --no-verify reads checkpoints without a manifest, "
        "such as those of FSDP2 and dcp.save; it does not notice damaged data.",
    ),
]
Prefix = Annotated[
    str,
    typer.Option(
        metavar="TEXT",
        help="What the keys begin with if another program wrote DIR: 'app' for app.model and app.optim, or "
        "'model=,optim=optimizer' for a model without a prefix and its optimizer.",
        show_default=False,
    ),
]
AverageName = Annotated[
    str | None,
    typer.Option(
        "--average",
        metavar="NAME",
        help="Which average, if DIR has several: one that was saved beside the optimizer, or 'optim' for that of the "
        "optimizer itself.",
        show_default=False,
    ),
]
OutSafetensors = Annotated[
    str, typer.Argument(metavar="OUT.safetensors", help="The file to write.", show_default=False)
]
ExportDtype = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype", help="Convert the optimizer's parameters. Default: each keeps its own dtype.", show_default=False
    ),
]
MaxShardGb = Annotated[
    float, typer.Option(help="Write several files and an index above this many gigabytes.", min=1e-6)
]
TiesByValue = Annotated[
    bool, typer.Option(help="If DIR does not record ties, export what has a parameter's values as that parameter.")
]
