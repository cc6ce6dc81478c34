"""A folder of checkpoints, one per saved step: it knows which is the latest, and removes those that are superseded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..comm.agreement import Fingerprint
from ..comm.reports import CollectiveCall
from .averages import Averages
from .format import folder as folders
from .format.folder import NewCheckpoint, step_name, steps_in
from .format.manifest import CheckpointError
from .format.nearby import refuse_as_folder
from .format.paths import AnyPath, UserPath, absolute, as_path, is_store
from .load import restore
from .offline.verify import newest_whole
from .pending import PendingSave
from .save import Saver, WhenBusy

_LOG = logging.getLogger("dist_asgd")


@dataclass(frozen=True, slots=True)
class Restored:
    """The checkpoint that ``CheckpointManager.restore()`` has loaded.

    Attributes:
        step: the number of steps after which the checkpoint was saved.
        path: the checkpoint's directory.
        extra: what this rank gave as ``extra`` when it was saved; see ``load_checkpoint``.
        skipped: with ``fallback=True``, newer checkpoints that could not be read, newest first, each with its error.
    """

    step: int
    path: AnyPath
    extra: Any
    skipped: tuple[tuple[AnyPath, str], ...] = ()


class CheckpointManager:
    """Checkpoints in ``folder/step-00000012`` and so on, the newest ``keep`` of them, and a link ``folder/latest``.

    A checkpoint is removed only when a newer one is whole and on disk. Steps go up: saving at a step that is not beyond
    those of all checkpoints in the folder is an error. Files of crashed saves are ignored, and the next save removes
    them. Only one job at a time may save to a folder. As a context manager it waits on exit for the last save, and
    raises its error.

    Args:
        folder: the folder, on a file system that all ranks share, where it is made if it does not exist, or in an
            object store, where it has no link ``latest``.
        keep: how many checkpoints to keep; None keeps all.
        when_busy: what ``async_save`` does while the last save runs: ``"wait"``, or ``"refuse"`` with a RuntimeError.
    """

    def __init__(self, folder: UserPath, *, keep: int | None = 3, when_busy: WhenBusy = "wait") -> None:
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
            raise ValueError(f"dist_asgd: keep must be a number from 1 on, or None to keep all, got {keep!r}.")
        if when_busy not in ("wait", "refuse"):
            raise ValueError(f"dist_asgd: when_busy must be 'wait' or 'refuse', got {when_busy!r}.")
        self.folder = absolute(as_path(folder))
        self._keep = keep
        self._when_busy: WhenBusy = when_busy
        # Not the saver, which would keep the memory of a deleted optimizer.
        self._last_save: PendingSave | None = None
        # What the last restore() has passed over, which the next save moves out of the way.
        self._damaged: list[AnyPath] = []
        # A store has no folders without objects.
        if not is_store(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def save(
        self, model: nn.Module, optimizer: Optimizer, *, step: int, extra: Any = None, averages: Averages = None
    ) -> AnyPath:
        """Save as ``save_checkpoint`` does, and remove superseded checkpoints. Collective. Returns the directory."""
        self._save(CollectiveCall.SAVE_CHECKPOINT, model, optimizer, step, extra, averages)
        return self.path_of(step)

    def async_save(
        self, model: nn.Module, optimizer: Optimizer, *, step: int, extra: Any = None, averages: Averages = None
    ) -> PendingSave:
        """Do the same in the background, as ``async_save_checkpoint`` does. Collective."""
        pending = self._save(CollectiveCall.ASYNC_SAVE_CHECKPOINT, model, optimizer, step, extra, averages)
        assert pending is not None
        return pending

    def wait(self) -> None:
        """Wait until the last save is whole, on disk; raises its error. Every rank calls it before its group ends."""
        last, self._last_save = self._last_save, None
        if last is not None:
            last.wait()

    def path_of(self, step: int) -> AnyPath:
        """Return the path that the checkpoint of ``step`` has, or would have."""
        return self.folder / step_name(step)

    def steps(self) -> list[int]:
        """Return the steps of all whole checkpoints, oldest first; no communication."""
        return [step for step, _ in steps_in(self.folder)]

    def latest(self) -> AnyPath | None:
        """Return the newest whole checkpoint, or None; no communication."""
        found = steps_in(self.folder)
        return found[-1][1] if found else None

    def restore(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        step: int | None = None,
        strict: bool = True,
        verify: bool = True,
        fallback: bool = False,
        averages: Averages = None,
    ) -> Restored | None:
        """Load the checkpoint of ``step``, or the latest, as ``load_checkpoint`` does. Collective.

        With ``fallback=True`` a checkpoint that is damaged or not whole is passed over, and the newest one before it
        that loads is taken, the same on all ranks. Every rank logs which were passed over and why, and has them in
        ``skipped`` of the result. The next save moves them aside, to ``folder/damaged-step-...``. Without it such a
        checkpoint is an error, which names the newest one that is whole. A checkpoint of another model is an error in
        both cases.

        Returns None on every rank, and changes nothing, if there is no checkpoint.
        """
        saver = Saver.of(optimizer)
        saver.agree(
            CollectiveCall.RESTORE_CHECKPOINT,
            Fingerprint(
                "checkpoints to restore", [("step", step), ("fallback", fallback)], "Pass the same step and fallback."
            ),
        )
        saver.wait_pending()
        # That of another optimizer may be about to become the latest.
        self.wait()
        kept = saver.agree_on_averages(CollectiveCall.RESTORE_CHECKPOINT, averages, optimizer)
        # Rank 0 decides which is the latest: on a shared file system other ranks may not see the newest one yet.
        candidates = saver.on_first(CollectiveCall.RESTORE_CHECKPOINT, lambda: self._candidates(step))
        skipped: list[tuple[AnyPath, str]] = []
        for path in candidates:
            try:
                call = CollectiveCall.RESTORE_CHECKPOINT
                loaded = restore(saver, call, path, model, optimizer, strict, verify, averages=kept)
            except CheckpointError as error:
                # All ranks raise it, whichever of them has met the damage, so all of them go on to the same one.
                skipped.append((path, str(error)))
                if not fallback:
                    raise CheckpointError(f"{error}{self._advice(saver, candidates[1:])}") from error
                continue
            # Without a manifest (verify=False) only the directory's name tells the step.
            loaded_step = int(path.name.removeprefix("step-")) if loaded.step is None else loaded.step
            self._damaged = [damaged for damaged, _ in skipped]
            for damaged, text in skipped:
                _LOG.warning("fell back to %s, because %s could not be read: %s", path, damaged.name, text)
            return Restored(loaded_step, path, loaded.extra, tuple(skipped))
        if skipped:
            texts = "\n".join(text for _, text in skipped)
            raise CheckpointError(
                f"dist_asgd: no checkpoint in {self.folder} can be read, so none is restored:\n{texts}"
            )
        return None

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()

    def _save(
        self,
        call: CollectiveCall,
        model: nn.Module,
        optimizer: Optimizer,
        step: int,
        extra: Any,
        averages: Averages,
    ) -> PendingSave | None:
        saver = Saver.of(optimizer)
        path = self.path_of(step) if isinstance(step, int) and step >= 0 else self.folder
        begin, commit, busy = self._begin, self._commit, self._when_busy
        last = self._last_save
        # A save that begins removes the files of unfinished ones, also those of another optimizer.
        self._last_save = saver.save(call, path, model, optimizer, step, extra, averages, busy, begin, commit, last)
        return self._last_save

    def _candidates(self, step: int | None) -> list[AnyPath]:
        """Return the checkpoint to restore, and all before it, newest first; called on rank 0."""
        refuse_as_folder(self.folder)
        found = [entry for _, entry in reversed(steps_in(self.folder, with_damaged=True))]
        if step is None:
            return found
        wanted = self.path_of(step)
        return [wanted, *(entry for entry in found if entry.name < wanted.name)]

    def _advice(self, saver: Saver, earlier: list[AnyPath]) -> str:
        """Return what to do about a checkpoint that cannot be read, given those before it. Collective."""
        path, read = saver.on_first(CollectiveCall.RESTORE_CHECKPOINT, lambda: newest_whole(earlier))
        if path is None:
            return f" No earlier checkpoint in {self.folder} is whole." if earlier else ""
        how = "" if read else " by its files' sizes (it was not read whole)"
        return (
            f" The newest checkpoint before it that is whole{how} is {path.name}: pass fallback=True to restore() to "
            f"load it, or step={int(path.name.removeprefix('step-'))}."
        )

    def _begin(self, path: AnyPath) -> NewCheckpoint:
        """Clear the folder of leftovers and make the directory to write in; called on rank 0."""
        if not is_store(self.folder) and not self.folder.is_dir():
            raise ValueError(f"dist_asgd: the folder of checkpoints {self.folder} has vanished. Make it again.")
        refuse_as_folder(self.folder)
        folders.clear(self.folder)
        if self._damaged:
            folders.set_aside(self.folder, self._damaged)
            self._damaged = []
        newest = self.latest()
        if newest is not None and newest.name >= path.name:
            raise ValueError(
                f"dist_asgd: {self.folder} has a checkpoint of a later or the same step, {newest.name}, so {path.name} "
                f"would not become the latest. Remove those of the run that you leave, or use another folder. Jobs and "
                f"stages of a pipeline need folders of their own."
            )
        return folders.begin(path)

    def _commit(self, new: NewCheckpoint) -> None:
        """Put the checkpoint in place, and remove superseded ones; called on rank 0 when all files are on disk."""
        # In this order: whenever a crash comes, `latest` leads to a whole checkpoint.
        new.put_in_place()
        whole = [entry for _, entry in steps_in(self.folder)]
        folders.point_latest(self.folder, whole[-1].name)
        for superseded in whole[: -self._keep] if self._keep is not None else ():
            folders.remove(superseded)
