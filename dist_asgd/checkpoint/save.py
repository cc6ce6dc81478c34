"""Saving a model and its optimizer from all ranks, now or in the background.

A save has two halves. In the call itself every rank decides what it writes, copies it to host memory if the save is
asynchronous, and agrees with the others that all can go on (``Saver.save``). The second half writes the files and puts
the directory in place (``Saver._write``); in an asynchronous save it runs in a thread of its own, with a process group
of its own, while training goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from torch import nn
from torch.optim import Optimizer

from ..comm import Communicator, Communicators, PeerError
from ..comm.agreement import NO_FINGERPRINT, Agreement, Fingerprint, public_call
from ..comm.reports import CollectiveCall
from ..gradients.base import Gradients
from ..labels import Label, label, labelled
from ..sharded_average import ShardedAverage
from ..sharded_state import ShardedState
from .averages import Averages, check_ranks, named
from .entries import FlatState, LocalChunks, flat_state, local_chunks, state_to_save, without_copies
from .format import folder
from .format.file_report import Described, FileReport, described, packed, unpacked
from .format.folder import NewCheckpoint
from .format.paths import AnyPath, UserPath, absolute, as_path
from .format.room import check_room, least_bytes
from .format.writer import Frames, RankFile, WrittenFile
from .pending import PendingSave
from .rows import FragmentCache
from .staging import StagingArea

T = TypeVar("T")
WhenBusy = Literal["wait", "refuse"]
_SAME_AVERAGES = "Pass the same averages on every rank, under the same names."
# The attribute of the optimizer that holds its Saver.
_SAVER_ATTRIBUTE = "dist_asgd_saver"


class Saver:
    """Saves checkpoints of one optimizer; keeps its ranks, their group for the background, and staging memory.

    One per optimizer, also of ``torch.optim.ASGD``; loading, ``CheckpointManager`` and ``export_averaged`` use it to
    agree and to wait for the pending save.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._gradients: Gradients | None = None
        if isinstance(optimizer, ShardedState):
            self.communicators, self._gradients = optimizer.communicators, optimizer.gradients
        else:
            self.communicators = Communicators(None)
        # Made by the first agree(), because making a group is collective.
        self._background: Communicator | None = None
        self._agreement: Agreement | None = None
        self._staging = StagingArea()
        self._frames: Frames = {}
        self._fragments = FragmentCache()
        self._pending: PendingSave | None = None

    @classmethod
    def of(cls, optimizer: Optimizer) -> Saver:
        """Return the saver of ``optimizer``, which is made on first use and lives as long as the optimizer."""
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"dist_asgd: wanted the optimizer, got {type(optimizer).__name__}.")
        saver = vars(optimizer).get(_SAVER_ATTRIBUTE)
        if saver is None:
            saver = cls(optimizer)
            setattr(optimizer, _SAVER_ATTRIBUTE, saver)
        return cast(Saver, saver)

    @property
    def rank(self) -> int:
        """This rank among the ranks that save together."""
        return self.communicators.rank

    @property
    def world_size(self) -> int:
        """How many ranks save together."""
        return self.communicators.world_size

    def agree(
        self, call: CollectiveCall, fingerprint: Fingerprint = NO_FINGERPRINT, problem: Exception | None = None
    ) -> None:
        """Make sure that all ranks are in the same call and can go on; raises on all ranks or on none. Collective.

        It goes through the optimizer's own group and gradients, so that a rank in another call is noticed, and a
        backward that another rank has run alone is served first (stage 2).
        """
        if self._gradients is not None:
            self._gradients.agree(call, fingerprint, problem)
        else:
            Agreement(self.communicators.host).agree(call, fingerprint, problem=problem)
        if self._background is None:
            self._background = self.communicators.background
            # Not watched: while files are written, ranks wait for each other's disks.
            self._agreement = Agreement(self._background, watches_waits=False)

    def agree_on_averages(
        self, call: CollectiveCall, averages: Averages, optimizer: Optimizer
    ) -> dict[str, ShardedAverage]:
        """Return the averages that the caller passed, by name. Collective if there are any: all ranks have the same.

        A rank that passes none comes to its next agreement, and all ranks raise there.
        """
        kept: dict[str, ShardedAverage] = {}
        fingerprint, problem = NO_FINGERPRINT, None
        try:
            kept = named(averages, optimizer)
            check_ranks(kept, self.communicators)
            fingerprint = Fingerprint("averages of a checkpoint", [("averages", list(kept))], _SAME_AVERAGES)
        except Exception as error:
            problem = error
        if averages is not None and (kept or problem):
            self.agree(call, fingerprint, problem)
        for average in kept.values():
            average.adopt_params()
        return kept

    def on_first(self, call: CollectiveCall, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0, return its result on every rank, raise its error on every rank. Collective."""
        result = self._run_on_first(call, action)
        assert self._background is not None
        return cast(T, self._background.exchange_objects(result)[0])

    def from_first(self, data: bytes) -> bytes:
        """Return rank 0's ``data`` on every rank; what other ranks pass is ignored. Collective, after ``agree``."""
        assert self._background is not None
        return cast(bytes, self._background.exchange_objects(data if self.rank == 0 else b"")[0])

    def _run_on_first(self, call: CollectiveCall, action: Callable[[], T]) -> T | None:
        """Run ``action`` on rank 0, which alone gets its result. Collective; its error is raised on every rank."""
        result, problem = None, None
        if self.rank == 0:
            try:
                result = action()
            except OSError as error:
                problem = os_problem(error, writes=call is not CollectiveCall.RESTORE_CHECKPOINT)
            except Exception as error:
                problem = error
        self._agree_in_background(call, problem)
        return result

    def _agree_in_background(self, call: CollectiveCall, problem: Exception | None) -> None:
        assert self._agreement is not None
        self._agreement.agree(call, problem=problem)

    def wait_pending(self) -> None:
        """Wait for the save in the background, if there is one, and raise its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()

    @public_call
    def save(
        self,
        call: CollectiveCall,
        path: UserPath,
        model: nn.Module,
        optimizer: Optimizer,
        step: int,
        extra: Any,
        averages: Averages,
        when_busy: WhenBusy,
        begin: Callable[[AnyPath], NewCheckpoint],
        commit: Callable[[NewCheckpoint], None],
        before: PendingSave | None = None,
    ) -> PendingSave | None:
        """Save from all ranks; returns the pending save of an asynchronous ``call``, else None. Collective.

        ``begin`` makes the directory to write in, ``commit`` moves it to its final path; both run on rank 0. ``before``
        is a save to the same folder, perhaps of another optimizer, which has to end before this one begins.
        """
        adopt_params(optimizer)
        kept = self.agree_on_averages(call, averages, optimizer)
        fingerprint, problem = NO_FINGERPRINT, None
        target, state = cast(AnyPath, Path()), FlatState({}, {})
        try:
            target = absolute(as_path(path))
            _check(step, when_busy)
            # Whether it still runs may differ between ranks, so this too is for them to agree on.
            if when_busy == "refuse" and any(save is not None and not save.done() for save in (self._pending, before)):
                raise RuntimeError(
                    "dist_asgd: the last checkpoint is still being written. Save less often, or pass when_busy='wait'."
                )
            # The staging memory, and the background group, serve one save at a time.
            self.wait_pending()
            if before is not None:
                before.wait()
            rank, replica = self.rank, self.communicators.replica
            with label(Label.SAVE_STATE):
                found = state_to_save(model, optimizer, extra, rank, replica, self._fragments, kept)
                state = flat_state(found, rank, replica)
            if call is CollectiveCall.ASYNC_SAVE_CHECKPOINT:
                with label(Label.SAVE_COPY):
                    state = state._replace(sections=self._staging.copy(state.sections))
            entries: list[tuple[str, object]] = [("path", str(target)), ("step", step)]
            fingerprint = Fingerprint(
                "checkpoints to save", entries, "Pass the same path, step and averages on every rank."
            )
        except Exception as error:
            problem = error
        self.agree(call, fingerprint, problem)
        for average in kept.values():
            # Averages that were not updated equally often are those of different steps.
            average.gradients.agree(call)

        def write() -> None:
            self._write(call, target, state, step, begin, commit)

        if call is CollectiveCall.SAVE_CHECKPOINT:
            write()
            return None
        self._pending = PendingSave(target, step, write)
        return self._pending

    def _write(
        self,
        call: CollectiveCall,
        path: AnyPath,
        state: FlatState,
        step: int,
        begin: Callable[[AnyPath], NewCheckpoint],
        commit: Callable[[NewCheckpoint], None],
    ) -> None:
        """Write the checkpoint of ``state`` to ``path``. Collective in the background group; raises on all ranks."""
        new: NewCheckpoint | None = None

        def begin_here() -> tuple[str, str]:
            nonlocal new
            new = begin(path)
            return new.path.name, new.tag

        def finish(reports: Sequence[FileReport], found: Described) -> None:
            assert new is not None
            new.finish(step, reports, found, self.communicators.names.describe([0]))
            commit(new)

        def discard() -> None:
            assert new is not None
            new.discard()

        try:
            name, tag = self.on_first(call, begin_here)
            # Each rank's own path: that of a store has this rank's way to it.
            temporary = path.with_name(name) if name != path.name else path
            try:
                self._write_files(call, temporary, tag, path, state, finish)
            except PeerError:
                # The files stay as a leftover: to remove them all ranks would have to agree, and one is gone.
                raise
            except Exception:
                # Raised on every rank alike, so nobody writes any more. An interruption is this rank's own: it leaves
                # the files too, as the others still write.
                self._run_on_first(call, discard)
                raise
        except PeerError as error:
            raise PeerError(
                f"dist_asgd: saving {path} failed on {self.communicators.names.place(self.rank)}: a peer has died, was "
                f"cut off, or did not arrive within the process group's timeout. Earlier checkpoints are whole: "
                f"restart from the last one. The backend said: {error.__cause__}"
            ) from error
        finally:
            # Whatever was left is now a leftover, which the next save may remove.
            if new is not None:
                new.close()

    @labelled(Label.SAVE_WRITE)
    def _write_files(
        self,
        call: CollectiveCall,
        temporary: AnyPath,
        tag: str,
        path: AnyPath,
        state: FlatState,
        finish: Callable[[Sequence[FileReport], Described], None],
    ) -> None:
        """Write all files into ``temporary``, and let rank 0 finish it. Collective in the background group.

        ``tag`` is a part of the files' names.
        """
        assert self._background is not None
        local = LocalChunks([], {})
        written: WrittenFile | None = None
        found, problem = Described(b"", b""), None
        try:
            local = local_chunks(state, self.world_size)
        except Exception as error:
            problem = _save_error(path, error)
        # A rank with a problem takes part in the collectives up to the next agreement, where all ranks raise it.
        chunks = without_copies(local.chunks, self._background)
        sums = self._background.exchange(torch.tensor(least_bytes(chunks), device="cpu")).sum(0).tolist()
        try:
            check_room(path, *sums)
        except Exception as error:
            problem = problem or error
        with RankFile(temporary, self.rank, self._frames, tag) as file:
            try:
                written = None if problem else file.write(chunks, local.paths)
            except Exception as error:
                problem = _save_error(path, error)
            self._agree_in_background(call, problem)
            reports: list[FileReport] = []
            gathered = self._background.gather_objects(packed(written), 0)
            try:
                # Before sync(), because the disks are still at work on what was written.
                if gathered is not None:
                    reports = unpacked(gathered)
                    found = described(path, reports)
                file.sync()
            except Exception as error:
                problem = _save_error(path, error)
            self._agree_in_background(call, problem)

        def complete() -> None:
            try:
                with label(Label.SAVE_FINISH):
                    finish(reports, found)
            except Exception as error:
                raise _save_error(path, error) from error

        self._run_on_first(call, complete)


def _check(step: int, when_busy: str) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"dist_asgd: step must be a whole number from 0 on, got {step!r}.")
    if when_busy not in ("wait", "refuse"):
        raise ValueError(f"dist_asgd: when_busy must be 'wait' or 'refuse', got {when_busy!r}.")


def take_in(optimizer: Optimizer, indices: Iterable[int]) -> bool:
    """Give the frozen ones of these parameters state, as in torch, for a load; whether there are any. Collective."""
    return isinstance(optimizer, ShardedState) and optimizer.registry.take_in(optimizer.param_groups, indices)


def adopt_params(optimizer: Optimizer) -> None:
    """Let a ShardedASGD take parameters and ``param_groups`` as they are now. Collective if they were changed."""
    if isinstance(optimizer, ShardedState):
        optimizer.adopt_params()


def os_problem(error: OSError, *, writes: bool = True) -> Exception:
    """Return the error that users get for one of the operating system: with the file, and what has become of it."""
    what = f" {error.filename}" if error.filename else ""
    if not writes:
        return RuntimeError(f"dist_asgd: cannot read the folder of checkpoints:{what}: {error.strerror or error}.")
    is_file = "://" not in str(error.filename)
    vanished = is_file and isinstance(error, FileNotFoundError)
    hint = " The folder has vanished, or not all ranks share it." if vanished else ""
    return RuntimeError(
        f"dist_asgd: cannot write the checkpoint:{what}: {error.strerror or error}.{hint} Nothing of it is kept; "
        f"checkpoints that were there before are whole."
    )


def _save_error(path: AnyPath, error: Exception) -> Exception:
    """Return ``error`` as every rank raises it."""
    if isinstance(error, OSError):
        return os_problem(error)
    if str(error).startswith("dist_asgd"):
        return error
    return RuntimeError(f"dist_asgd: saving {path} failed: {type(error).__name__}: {error}")


def save_checkpoint(
    path: UserPath,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    step: int,
    extra: Any = None,
    averages: Averages = None,
) -> None:
    """Save ``model``, ``optimizer`` and ``averages`` from all ranks into a new directory ``path``. Collective.

    The checkpoint loads in any topology: one process, stage 1 and 2, FSDP2 with ``torch.optim.ASGD``, at any world
    size. On return it is whole, on disk or in the store, and hashed. After an error, which every rank raises, there is
    nothing at ``path``, and model and optimizer are untouched.

    Args:
        path: the checkpoint's own directory; its parent must exist, on a file system that all ranks share. ``~`` and
            ``file://`` work, and so do addresses of object stores (``s3://bucket/run``), as text or as a ``UPath``.
        model: the module whose parameters the optimizer was given, wrapped by DDP or torch.compile or not.
        optimizer: a ``ShardedASGD`` of any stage, or another optimizer (``torch.optim.ASGD``, AdamW, SGD, ...), also on
            parameters of FSDP2. One whose state has no place in a checkpoint, such as LBFGS, is refused.
        step: the number of steps taken, for the manifest.
        averages: a ``ShardedAverage`` beside the optimizer, or several by name: ``{"ema": ema, "tail": tail}``.
        extra: further values to save for this rank: tensors, numbers, strings, None, and dicts, lists and tuples of
            them (state dicts of lr schedulers, RNG states, the position in the data).

    Raises:
        ValueError: ``path`` exists, ``extra`` or something in the optimizer's state cannot be loaded safely, or ranks
            disagree.
        RuntimeError: the file system or the store refused (disk full, read-only, vanished, no answer).
        PeerError: a rank died.
    """
    saver = Saver.of(optimizer)
    call = CollectiveCall.SAVE_CHECKPOINT
    saver.save(call, path, model, optimizer, step, extra, averages, "wait", folder.begin, folder.put_in_place)


def async_save_checkpoint(
    path: UserPath,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    step: int,
    extra: Any = None,
    averages: Averages = None,
    when_busy: WhenBusy = "wait",
) -> PendingSave:
    """Save in the background what ``save_checkpoint`` saves. Collective.

    Returns when this rank's fragments are copied to host memory. The memory, as much as the parameters and ``ax``
    divided by the number of ranks, is kept for the next save. An error is raised by ``wait()`` of the result, or by the
    next save or load of this optimizer, or at exit. Wait for the last save before ``destroy_process_group()``.

    Args:
        when_busy: what to do if the last save of this optimizer still runs: ``"wait"`` for it, or ``"refuse"`` with a
            RuntimeError on every rank.
    """
    saver = Saver.of(optimizer)
    call = CollectiveCall.ASYNC_SAVE_CHECKPOINT
    begin, commit = folder.begin, folder.put_in_place
    pending = saver.save(call, path, model, optimizer, step, extra, averages, when_busy, begin, commit)
    assert pending is not None
    return pending
