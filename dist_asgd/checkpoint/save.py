"""Saving a model and its optimizer from all ranks, now or in the background."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from torch import nn
from torch.optim import Optimizer

from ..comm import Communicators, PeerError
from ..comm.agreement import NO_FINGERPRINT, Agreement, CollectiveCall, Fingerprint
from ..gradients.base import Gradients
from ..optimizer import ShardedASGD
from ..state_dict.sharded import ShardTensorCache
from .chunks import LocalChunks, local_chunks, without_copies
from .entries import describe
from .format import directory
from .format.archives import Frames
from .format.writer import PartFile, finish, metadata_of
from .staging import StagingArea

T = TypeVar("T")
WhenBusy = Literal["wait", "refuse"]
_KEPT_AS = "dist_asgd_saver"


class PendingSave:
    """A save in the background. ``wait()`` raises what went wrong, the same on every rank."""

    def __init__(self, path: Path, step: int, work: Callable[[], None]) -> None:
        self.path = path
        self.step = step
        self._work: Callable[[], None] | None = work
        self._failure: BaseException | None = None
        self._may_begin = threading.Event()
        # Not a daemon: the interpreter does not end before the checkpoint is whole.
        self._thread = threading.Thread(target=self._run, name=f"dist_asgd save of {path.name}")
        atexit.register(self._surface)
        try:
            self._thread.start()
        finally:
            # Also where a signal ends the start: the interpreter waits for this thread.
            self._may_begin.set()

    def _run(self) -> None:
        # A new thread keeps the interpreter for 5 ms; this one lets the training loop have it.
        self._may_begin.wait()
        # What it holds on to is free for the next save when it is done, and not when this is dropped.
        work, self._work = self._work, None
        assert work is not None
        try:
            work()
        except BaseException as error:
            self._failure = error

    def done(self) -> bool:
        """Whether this rank's part has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until the checkpoint is whole and on disk. Its failure is raised once: here, at the next save, or at exit."""
        self._thread.join()
        atexit.unregister(self._surface)
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _surface(self) -> None:
        self.wait()


class Saver:
    """What checkpoints of one optimizer need beside it: its ranks, a group for the background, staging memory."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._gradients: Gradients | None = None
        if isinstance(optimizer, ShardedASGD):
            self.communicators, self._gradients = optimizer.communicators, optimizer.gradients
        else:
            self.communicators = Communicators(None)
        self._agreement: Agreement | None = None
        self._stage = StagingArea()
        self._frames: Frames = {}
        self._known: ShardTensorCache = {}
        self._pending: PendingSave | None = None

    @classmethod
    def of(cls, optimizer: Optimizer) -> Saver:
        """The saver of ``optimizer``, which lives as long as it; made on first use."""
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"dist_asgd: wanted the optimizer, got {type(optimizer).__name__}.")
        saver = vars(optimizer).get(_KEPT_AS)
        if saver is None:
            saver = cls(optimizer)
            setattr(optimizer, _KEPT_AS, saver)
        return cast(Saver, saver)

    @property
    def rank(self) -> int:
        """This rank among those that save together."""
        return self.communicators.rank

    @property
    def world_size(self) -> int:
        """How many ranks save together."""
        return self.communicators.world_size

    def meet(
        self, call: CollectiveCall, fingerprint: Fingerprint = NO_FINGERPRINT, problem: Exception | None = None
    ) -> None:
        """Collective: where all ranks make sure that they are in the same call; raises on all or none."""
        if self._gradients is not None:
            self._gradients.agree(call, fingerprint, problem)
        else:
            Agreement(self.communicators.host).agree(call, fingerprint, problem=problem)
        if self._agreement is None:
            self._agreement = Agreement(self.communicators.background)

    def on_first(self, call: CollectiveCall, action: Callable[[], T]) -> T:
        """Collective, after ``meet``: what ``action`` returns on rank 0; its failure is raised on every rank."""
        return cast(T, self.communicators.background.exchange_objects(self._do_first(call, action))[0])

    def _do_first(self, call: CollectiveCall, action: Callable[[], T]) -> T | None:
        """``on_first`` for what only rank 0 needs to know."""
        result, problem = None, None
        if self.rank == 0:
            try:
                result = action()
            except OSError as error:
                problem = os_problem(error)
            except Exception as error:
                problem = error
        self._confer(call, problem)
        return result

    def _confer(self, call: CollectiveCall, problem: Exception | None) -> None:
        assert self._agreement is not None
        self._agreement.agree(call, problem=problem)

    def settle_pending(self) -> None:
        """Wait for the save in the background, if there is one, and raise its failure."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()

    def save(
        self,
        call: CollectiveCall,
        path: str | os.PathLike[str],
        model: nn.Module,
        optimizer: Optimizer,
        step: int,
        extra: Any,
        when_busy: WhenBusy,
        begin: Callable[[Path], Path],
        commit: Callable[[Path, Path], None],
    ) -> PendingSave | None:
        """Collective. ``begin`` makes a directory to write in, ``commit`` gives it its name; both on rank 0."""
        fingerprint, problem, state, target = NO_FINGERPRINT, None, {}, Path()
        try:
            target = Path(os.path.abspath(path))
            _check(step, when_busy)
            # Whether it still runs may differ between ranks, so this too is for them to agree on.
            if when_busy == "refuse" and self._pending is not None and not self._pending.done():
                raise RuntimeError(
                    "dist_asgd: the last checkpoint is still being written. Save less often, or pass when_busy='wait'."
                )
            self.settle_pending()
            state = describe(model, optimizer, extra, self.rank, self.communicators.replica, self._known)
            if call is CollectiveCall.ASYNC_SAVE_CHECKPOINT:
                state = self._stage.copy(state)
            entries: list[tuple[str, object]] = [("path", str(target)), ("step", step)]
            fingerprint = Fingerprint("checkpoints to save", entries, "Pass the same path and step on every rank.")
        except Exception as error:
            problem = error
        self.meet(call, fingerprint, problem)

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
        path: Path,
        state: dict[str, dict[str, Any]],
        step: int,
        begin: Callable[[Path], Path],
        commit: Callable[[Path, Path], None],
    ) -> None:
        try:
            temporary = self.on_first(call, lambda: begin(path))
            try:
                self._fill(call, temporary, path, state, step, commit)
            except PeerError:
                raise
            except Exception:
                # Every rank is here: nobody writes any more.
                self._do_first(call, lambda: directory.discard(temporary))
                raise
        except PeerError as error:
            raise PeerError(
                f"dist_asgd: saving {path} failed on rank {self.rank} of {self.world_size}: a peer has died, was cut "
                f"off, or did not arrive within the process group's timeout. Earlier checkpoints are whole: restart "
                f"from the last one. The backend said: {error.__cause__}"
            ) from error

    def _fill(
        self,
        call: CollectiveCall,
        temporary: Path,
        path: Path,
        state: dict[str, dict[str, Any]],
        step: int,
        commit: Callable[[Path, Path], None],
    ) -> None:
        background = self.communicators.background
        held = LocalChunks([], {})
        part, metadata, problem = None, b"", None
        try:
            held = local_chunks(state, self.world_size)
        except Exception as error:
            problem = _shown(path, error)
        pieces = without_copies(held.pieces, background)
        with PartFile(temporary, self.rank, self._frames) as file:
            try:
                part = None if problem else file.write(pieces, held.paths)
            except Exception as error:
                problem = _shown(path, error)
            self._confer(call, problem)
            parts = background.gather_objects(part, 0)
            try:
                # Meanwhile the disks are at work.
                metadata = metadata_of(path, parts) if parts else b""
                file.sync()
            except Exception as error:
                problem = _shown(path, error)
            self._confer(call, problem)

        def complete() -> None:
            try:
                finish(temporary, step, parts or (), metadata)
                commit(temporary, path)
            except Exception as error:
                raise _shown(path, error) from error

        self._do_first(call, complete)


def _check(step: int, when_busy: str) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"dist_asgd: step must be a whole number from 0 on, got {step!r}.")
    if when_busy not in ("wait", "refuse"):
        raise ValueError(f"dist_asgd: when_busy must be 'wait' or 'refuse', got {when_busy!r}.")


def os_problem(error: OSError) -> Exception:
    """An error of the operating system in the words of this package, with the file in it."""
    what = f" {error.filename}" if error.filename else ""
    hint = " The folder has vanished, or not all ranks share it." if isinstance(error, FileNotFoundError) else ""
    return RuntimeError(
        f"dist_asgd: cannot write the checkpoint:{what}: {error.strerror or error}.{hint} Nothing of it is kept; "
        f"checkpoints that were there before are whole."
    )


def _shown(path: Path, error: Exception) -> Exception:
    """``error`` as every rank is told of it."""
    if isinstance(error, OSError):
        return os_problem(error)
    if str(error).startswith("dist_asgd"):
        return error
    return RuntimeError(f"dist_asgd: saving {path} failed: {type(error).__name__}: {error}")


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    *,
    step: int,
    extra: Any = None,
) -> None:
    """Save ``model`` and ``optimizer`` from all ranks into a new directory ``path``. Collective.

    Loads in any topology: one process, stage 1 and 2, FSDP2 with ``torch.optim.ASGD``, at any world size. On return
    the checkpoint is whole, on disk, and hashed; on an error, which every rank raises, there is none at ``path`` and
    training state is untouched.

    Args:
        path: the checkpoint's own directory; its parent must exist, on a file system that all ranks share.
        model: the module whose parameters the optimizer was given, wrapped by DDP or torch.compile or not.
        optimizer: a ``ShardedASGD`` of any stage, or ``torch.optim.ASGD`` (on FSDP2 parameters too).
        step: the number of steps taken, for the manifest.
        extra: whatever else is to be kept, by this rank: tensors, numbers, strings, None, dicts, lists and tuples of
            them (state dicts of lr schedulers, RNG states, the position in the data).

    Raises:
        ValueError: ``path`` exists, ``extra`` cannot be loaded safely, or ranks disagree.
        RuntimeError: the file system refused (disk full, read-only, vanished).
        PeerError: a rank died.
    """
    saver = Saver.of(optimizer)
    call = CollectiveCall.SAVE_CHECKPOINT
    saver.save(call, path, model, optimizer, step, extra, "wait", directory.begin, directory.put_in_place)


def async_save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    *,
    step: int,
    extra: Any = None,
    when_busy: WhenBusy = "wait",
) -> PendingSave:
    """``save_checkpoint`` in the background: returns when this rank's part is copied to host memory. Collective.

    The copy is kept for the next save (parameters and ``ax`` divided by the number of ranks). A failure is raised by
    ``wait()`` of what is returned, or by the next save or load of this optimizer, or at exit. Wait for the last save
    before ``destroy_process_group()``.

    Args:
        when_busy: while the last save of this optimizer still runs: ``"wait"`` for it, or ``"refuse"`` with a
            RuntimeError on every rank.
    """
    saver = Saver.of(optimizer)
    call = CollectiveCall.ASYNC_SAVE_CHECKPOINT
    pending = saver.save(call, path, model, optimizer, step, extra, when_busy, directory.begin, directory.put_in_place)
    assert pending is not None
    return pending
