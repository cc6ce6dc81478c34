"""The options that every run has: a frozen dataclass, from whose subclasses typer makes command lines."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_type_hints

import typer

from parallel import Mode

# The order of the panels in --help; options keep their order inside a panel.
_PANELS = ("Data", "Model", "Ranks", "Optimizer", "Run", "Files")


def option(panel: str, text: str, *names: str, minimum: float | None = None, maximum: float | None = None) -> Any:
    """Describe one option: its panel in --help, its help text, its names if it is a switch, and its range."""
    return typer.Option(*names, help=text, rich_help_panel=panel, min=minimum, max=maximum)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of a run, whatever it trains."""

    # Options that a checkpoint fixes: on resuming, another value would be ignored or would not fit.
    fixed_by_checkpoint: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")

    data: Annotated[
        list[Path] | None,
        option("Data", "File or folder to train on; may be repeated. Default: Python's own library sources."),
    ] = None
    seed: Annotated[int, option("Data", "Seeds the initial parameters and the order of the data.", minimum=0)] = 0
    stage: Annotated[
        int | None, typer.Option(min=1, max=2, help="Short for zero1 and zero2.", rich_help_panel="Ranks")
    ] = None
    lr: Annotated[float, option("Optimizer", "Learning rate.", minimum=0)] = 0.3
    weight_decay: Annotated[float, option("Optimizer", "L2 penalty.", minimum=0)] = 0.0
    clip: Annotated[float, option("Optimizer", "Largest global gradient norm; 0: no clipping.", minimum=0)] = 1.0
    bucket_cap_mb: Annotated[float, option("Optimizer", "Bucket size in MiB.")] = 25.0
    steps: Annotated[int, option("Run", "Optimizer steps in all.", minimum=1)] = 1000
    batch: Annotated[int, option("Run", "Windows per rank and backward pass.", minimum=1)] = 16
    eval_every: Annotated[int, option("Run", "Steps between evaluations.", minimum=1)] = 100
    log_every: Annotated[int, option("Run", "Steps between lines of metrics.", minimum=1)] = 10
    timeout: Annotated[int, option("Run", "Seconds after which a silent peer counts as lost.", minimum=1)] = 300
    out: Annotated[Path, option("Files", "Metrics, TensorBoard events, picture and summary.")] = Path("runs/train")
    checkpoint: Annotated[
        str | None,
        option(
            "Files",
            "Folder of checkpoints, which all nodes share, or its address in an object store (s3://...). Default: the "
            "folder `checkpoint` in --out.",
        ),
    ] = None
    checkpoint_every: Annotated[int, option("Files", "Steps between checkpoints; 0: only at the end.", minimum=0)] = 0
    keep: Annotated[int, option("Files", "Checkpoints to keep, the newest.", minimum=1)] = 3
    resume: Annotated[
        bool, option("Files", "Go on from the latest checkpoint, on any number of ranks, in any mode.", "--resume")
    ] = False
    resume_from: Annotated[
        str | None, option("Files", "Go on from this checkpoint (a step-... directory) instead of the latest.")
    ] = None
    overwrite: Annotated[
        bool, option("Files", "Start anew, and remove the folder's checkpoints of an earlier run.", "--overwrite")
    ] = False

    def __post_init__(self) -> None:
        if self.overwrite and (self.resume or self.resume_from):
            raise typer.BadParameter("--overwrite starts anew, --resume and --resume-from go on: give one of them")
        if self.resume and self.resume_from:
            raise typer.BadParameter(
                "--resume is for the latest checkpoint, --resume-from for another: give one of them"
            )
        if ":/" in str(self.out):
            raise typer.BadParameter(f"--out {self.out} is no folder of this machine; --checkpoint may be an address")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"--{name.replace('_', '-')} is not finite")

    @property
    def mode(self) -> Mode:
        """The mode that --stage selects."""
        return Mode.ZERO2 if self.stage == 2 else Mode.ZERO1

    @property
    def checkpoint_folder(self) -> str:
        """The folder in which checkpoints are written, and in which --resume looks for one."""
        return str(self.out / "checkpoint") if self.checkpoint is None else self.checkpoint

    def plain(self) -> dict[str, Any]:
        """Every option as a plain value for files; paths and enumeration members become strings."""
        return {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}


OptionsT = TypeVar("OptionsT", bound=RunOptions)


def app_of(options: type[OptionsT], body: Callable[[OptionsT], None]) -> typer.Typer:
    """Make the command line that has the fields of `options` as its options, and calls `body` with them."""

    def main(**values: Any) -> None:
        body(options(**values))

    hints = get_type_hints(options, include_extras=True)
    parameters = list(inspect.signature(options).parameters.values())
    parameters.sort(key=lambda parameter: _PANELS.index(hints[parameter.name].__metadata__[0].rich_help_panel))
    main.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    main.__annotations__ = {parameter.name: hints[parameter.name] for parameter in parameters}
    main.__doc__ = options.__doc__
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    return app


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path | StrEnum) else value
