"""``python -m benchmarks.trips``: how many files a reader opens to follow one step, one save and one load.

Two ranks train a small model in stage 2; rank 0 watches its own Python calls with ``sys.setprofile``.

Vocabulary
    trip    one public call from beginning to end: ``step()``, backward and ``step()``, ``save_checkpoint``,
            ``load_checkpoint``
    files   the files of the package ``dist_asgd`` in which a trip calls at least one function, lambda, comprehension
            or generator
    moves   how often a trip calls into another file of the package than the last call did; resuming a generator is a
            call. Returns do not count, and neither do calls into torch or the standard library: if a function in
            ``a.py`` calls one in ``b.py`` and, after its return, one in ``a.py``, these are two moves
    classes the classes of the package that define a function which a trip calls; a method that a subclass inherits
            counts for the base class

The numbers depend on the workload, so it is fixed: two linear layers (8 to 16 to 4 with a ``tanh`` between them, so
four parameters in one bucket), unnamed parameters, the default implementation (fused on CPUs with the compiled
kernel), float32, no buffers, no ``extra``. Each trip is counted when nothing happens in it for the first time: after
three training steps, and for a save after one save. The load is the first after that, into the same model and
optimizer. Only the calling thread is watched, and the garbage collector is off meanwhile.

The script uses the public API alone and takes whatever lies in the package's folder as "ours", so it compares trees
whose modules lie elsewhere: ``PYTHONPATH=OTHER_TREE python benchmarks/trips.py`` counts another tree.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dist_asgd
from benchmarks.ranks import Team
from dist_asgd import ShardedASGD, load_checkpoint, save_checkpoint

PACKAGE = str(Path(dist_asgd.__file__).parent) + "/"
NUM_RANKS = 2
NUM_WARM_UP_STEPS = 3
_WIDTH_WITHOUT_TERMINAL = 160


@dataclass
class Trip:
    """What one trip enters. Files are paths relative to the package; ``moves`` counts (from, to) pairs of them."""

    files: Counter[str] = field(default_factory=Counter)
    moves: Counter[tuple[str, str]] = field(default_factory=Counter)
    classes: set[tuple[str, str]] = field(default_factory=set)

    def as_dict(self) -> dict[str, Any]:
        """The counts, and the names behind them, for JSON."""
        return {
            "files": len(self.files),
            "moves": self.moves.total(),
            "classes": len(self.classes),
            "calls_by_file": dict(self.files.most_common()),
            "moves_by_pair": [[start, end, count] for (start, end), count in self.moves.most_common()],
            "class_names": sorted(f"{file}:{name}" for file, name in self.classes),
        }


@contextmanager
def recorded(trip: Trip) -> Iterator[None]:
    """Count every call of this thread into the package, until the block ends."""
    last: str | None = None

    def on_event(frame: FrameType, event: str, _: Any) -> None:
        nonlocal last
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        file = code.co_filename.removeprefix(PACKAGE)
        trip.files[file] += 1
        if last is not None and last != file:
            trip.moves[last, file] += 1
        last = file
        owner = code.co_qualname.partition(".")[0]
        if isinstance(frame.f_globals.get(owner), type):
            trip.classes.add((file, owner))

    gc.collect()
    gc.disable()
    sys.setprofile(on_event)
    try:
        yield
    finally:
        sys.setprofile(None)
        gc.enable()


class Traveller:
    """One rank's model and optimizer, trained until no trip does anything for the first time.

    An actor of ``benchmarks.ranks``: every method is collective, and only rank 0 counts.
    """

    def __init__(self, rank: int, _world_size: int, folder: str) -> None:
        self._rank = rank
        self._folder = Path(folder)
        torch.manual_seed(0)
        self._model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self._optimizer = ShardedASGD(self._model.parameters(), lr=0.1, stage=2)
        self._inputs = torch.randn(8, 8)  # (batch, features)
        for _ in range(NUM_WARM_UP_STEPS):
            self._loss().backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._optimizer.zero_grad()

    def trips(self) -> dict[str, dict[str, Any]]:
        """All trips by name, in order; on other ranks than 0 they are taken but not counted."""
        found = {"step": self._step(), "backward and step": self._backward_and_step()}
        self._save("first")
        found["save"] = self._counted(lambda: self._save("second"))
        found["load"] = self._counted(lambda: load_checkpoint(self._folder / "second", self._model, self._optimizer))
        return found

    def _step(self) -> dict[str, Any]:
        self._loss().backward()  # type: ignore[no-untyped-call]
        found = self._counted(self._optimizer.step)
        self._optimizer.zero_grad()
        return found

    def _backward_and_step(self) -> dict[str, Any]:
        loss = self._loss()

        def follow() -> None:
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()

        found = self._counted(follow)
        self._optimizer.zero_grad()
        return found

    def _save(self, name: str) -> None:
        save_checkpoint(self._folder / name, self._model, self._optimizer, step=NUM_WARM_UP_STEPS)

    def _loss(self) -> Tensor:
        loss: Tensor = self._model(self._inputs).square().mean()
        return loss

    def _counted(self, action: Callable[[], Any]) -> dict[str, Any]:
        trip = Trip()
        dist.barrier()
        if self._rank == 0:
            with recorded(trip):
                action()
        else:
            action()
        return trip.as_dict()


def count() -> dict[str, dict[str, Any]]:
    """Start two ranks, take every trip, and return what rank 0 counted, by the trip's name."""
    with tempfile.TemporaryDirectory(prefix="dist_asgd_trips_") as folder, Team(Traveller, NUM_RANKS, folder) as team:
        team.wait_ready()
        counted: dict[str, dict[str, Any]] = team.call("trips")[0]
        return counted


def show(counted: dict[str, dict[str, Any]], *, with_files: bool) -> None:
    """Print the table; ``with_files`` adds each trip's files and its moves between pairs of them, most first."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH_WITHOUT_TERMINAL)
    table = Table("trip", "files", "moves", "classes", box=None)
    for column in (1, 2, 3):
        table.columns[column].justify = "right"
    for name, trip in counted.items():
        table.add_row(name, *(f"{trip[key]:,}" for key in ("files", "moves", "classes")))
    console.print(table)
    for name, trip in counted.items() if with_files else ():
        console.print(f"\n{name}", style="bold")
        files = Table("file", "calls", box=None)
        files.columns[1].justify = "right"
        for file, calls in trip["calls_by_file"].items():
            files.add_row(file, f"{calls:,}")
        console.print(files)
        pairs = Table("from", "to", "moves", box=None)
        pairs.columns[2].justify = "right"
        for start, end, moves in trip["moves_by_pair"]:
            pairs.add_row(start, end, f"{moves:,}")
        console.print(pairs)
        console.print("classes: " + ", ".join(trip["class_names"]), soft_wrap=True)


def main() -> None:
    """Count the trips and print the counts, as the command line asks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trips", description=__doc__.splitlines()[0])
    parser.add_argument("--files", action="store_true", help="also the files, the moves between them and the classes")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    options = parser.parse_args()
    counted = count()
    if options.json:
        print(json.dumps(counted, indent=2))
    else:
        show(counted, with_files=options.files)


if __name__ == "__main__":
    main()
