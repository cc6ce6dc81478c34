"""Puts the averages in place of the parameters, and back, without a second copy of the model.

``ShardedASGD.averaged_parameters()`` does so with an ``Averages``. Each rank exchanges ``ax`` and the parameters in its
own shards, and gathers the parameters as after a step. An exchange that an exception or a signal interrupts leaves
enough behind to be undone: parameters and averages are never mixed up for good.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from .averaging_start import StartNotice
from .comm import PeerError, public_call
from .comm.agreement import NO_FINGERPRINT, CallsDiffer, Fingerprint
from .comm.reports import CollectiveCall
from .gather import Gatherer
from .labels import Label, labelled
from .state import ParamShards
from .storage.average import AverageMemory, peek
from .storage.buffers import BucketParam, ShardedParam, StateBuffer
from .storage.snapshots import mark_written
from .update.operators import Updater
from .update.schedule import Cohort
from .update.weights import AVERAGE_KEY, AverageSchedule

# Makes all ranks agree on what they do; takes what is wrong on this rank, and raises on all if anything is on any.
Agree = Callable[[Exception | None], object]


class FragmentExchange:
    """Exchanges this rank's fragments of one parameter and of its ``ax``, tile by tile through scratch memory.

    ``run`` and ``undo``, after ``mend``, go on from wherever an interruption stopped them. ``_progress`` is how many
    tiles have changed places, and of a torn tile its number, its stage, and how many have once it is mended.

    stage 1  scratch holds the tile's parameters, which may be overwritten in part; the average is whole
    stage 2  scratch holds the tile's parameters, the parameters are the average, which may be overwritten in part
    """

    def __init__(self, member: ShardedParam, updater: Updater) -> None:
        self._member = member
        self._tile_numel = updater.scratch_numel(member.bucket)
        self._num_tiles = -(-member.fragment.numel // self._tile_numel)
        self._scratch = updater.scratch(member.param_range(member.fragment.start, self._stop(0)))
        self._progress: tuple[int, tuple[int, int, int] | None] = (0, None)

    def run(self) -> None:
        """Exchange all tiles that have not changed places yet."""
        while (done := self._progress[0]) < self._num_tiles:
            self._exchange(done, done, done + 1)

    def undo(self) -> None:
        """Exchange all tiles back that have changed places: an exchange undoes itself."""
        while (done := self._progress[0]) > 0:
            self._exchange(done - 1, done, done - 1)

    def _exchange(self, tile: int, before: int, after: int) -> None:
        param, average, scratch = self._tensors(tile)
        scratch.copy_(param)
        # Each of these lines is one assignment, so that no interruption finds half of what it says.
        self._progress = (before, (tile, 1, before))
        param.copy_(average)
        self._progress = (before, (tile, 2, after))
        average.copy_(scratch)
        self._progress = (after, None)

    def mend(self) -> None:
        """Complete or take back the exchange of a torn tile."""
        torn = self._progress[1]
        if torn is not None:
            tile, stage, mended = torn
            param, average, scratch = self._tensors(tile)
            (param if stage == 1 else average).copy_(scratch)
            self._progress = (mended, None)

    def _stop(self, tile: int) -> int:
        return min(self._member.fragment.start + (tile + 1) * self._tile_numel, self._member.fragment.stop)

    def _tensors(self, tile: int) -> tuple[Tensor, Tensor, Tensor]:
        start, stop = self._member.fragment.start + tile * self._tile_numel, self._stop(tile)
        param, average = self._member.param_range(start, stop), self._member.bucket.average[start:stop]
        return param, average, self._scratch[: stop - start]


class FragmentCopy:
    """Sets this rank's fragment of a parameter aside, because its ``ax`` is wider: an exchange would round that."""

    def __init__(self, member: ShardedParam) -> None:
        self._member = member
        self._copy: Tensor | None = None

    def mend(self) -> None:
        """Do nothing: the copy is whole, or the parameter was not written yet."""

    def run(self) -> None:
        """Put the average, rounded, in place of the parameter."""
        start, stop = self._member.fragment.start, self._member.fragment.stop
        param = self._member.param_range(start, stop)
        if self._copy is None:
            # Where averages lie: their device may have no room for it.
            average = self._member.bucket.average
            self._copy = torch.empty_like(param, device=average.device).copy_(param)
        param.copy_(self._member.bucket.average[start:stop])

    def undo(self) -> None:
        """Put the parameter back."""
        if self._copy is not None:
            start, stop = self._member.fragment.start, self._member.fragment.stop
            self._member.param_range(start, stop).copy_(self._copy)
            self._copy = None


class Averages:
    """Exchanges ``ax`` with every parameter whose averaging has begun, and remembers what was exchanged.

    ``is_swapped`` is true from before the first exchange until everything is back.
    """

    # Those whose averages are in place now, over all optimizers of the process; it keeps none of them alive.
    _in_place: ClassVar[weakref.WeakSet[Averages]] = weakref.WeakSet()

    def __init__(self, updater: Updater, gatherer: Gatherer, start: StartNotice) -> None:
        self.start = start
        self._updater = updater
        self._gatherer = gatherer
        self._buffers: list[StateBuffer] = []
        self._exchanges: list[FragmentExchange | FragmentCopy] = []
        # The parameters that other ranks or this one exchange fragments of.
        self._begun: list[ShardedParam] = []
        self._shards: ParamShards | None = None
        # How many of the buffers were gathered since ranks last agreed, and whether they have agreed to leave.
        self._num_gathered = 0
        self._leaving = False
        self._exit_failed = False
        self.is_swapped = False
        # The hook before the step of every optimizer, as long as averages are in place.
        self._refusal: RemovableHandle | None = None

    def refusal(self, call: str) -> RuntimeError:
        """The error of a call that is made while the averages are in place of the parameters."""
        if self._exit_failed:
            return RuntimeError(
                f"dist_asgd: {call} after leaving averaged_parameters() has failed: the parameters are still the "
                f"averages. Enter and leave averaged_parameters() once more to bring them back."
            )
        return RuntimeError(
            f"dist_asgd: {call} inside averaged_parameters(): the parameters are the averages there, and the "
            f"state holds the parameters. Call it after the with block."
        )

    def refuse_inside(self, call: str) -> None:
        """Raise RuntimeError if ``call`` is made while the averages are in place of the parameters."""
        if self.is_swapped:
            raise self.refusal(call)

    @classmethod
    def refuse_swapped(cls, call: str, params: Iterable[Tensor]) -> None:
        """Raise RuntimeError if one of ``params`` is an average now, of whatever optimizer; ``call`` would read it."""
        if not cls._in_place:
            return
        swapped = {id(member.param): averages for averages in cls._in_place for member in averages._begun}
        found = next((averages for param in params if (averages := swapped.get(id(param))) is not None), None)
        if found is None:
            return
        if found._exit_failed:
            raise found.refusal(call)
        raise RuntimeError(
            f"dist_asgd: {call} inside averaged_parameters(): the parameters are the averages there. Call it after the "
            f"with block."
        )

    @contextmanager
    def in_place(
        self,
        shards: ParamShards,
        groups: Sequence[dict[str, Any]],
        agree: Callable[[CollectiveCall, Fingerprint, Exception | None], object],
        find_problem: Callable[[], Exception | None],
    ) -> Iterator[None]:
        """Inside the block, the parameters are the averages. Entering and leaving are collective.

        ``agree`` makes all ranks agree that they enter or leave. ``find_problem`` looks for what is wrong
        on this rank before anything is exchanged. If entering raises, every rank's parameters are as they were before.
        ``groups`` say when averaging begins, for the warning if it has not.
        """
        enter = partial(agree, CollectiveCall.AVERAGED_PARAMETERS, NO_FINGERPRINT)
        leave = partial(agree, CollectiveCall.END_OF_AVERAGED_PARAMETERS, NO_FINGERPRINT)
        # Averages and parameters that are moved inside the block are followed before they are exchanged back.
        self._shards = shards
        if self._exit_failed:
            self._leave(leave)
        if self.is_swapped:
            raise self.refusal("averaged_parameters()")
        self._refusal = self._refusal or register_optimizer_step_pre_hook(_refuse_step)
        try:
            # No variable of this frame holds the problem, whose traceback would refer to the frame.
            self._enter(shards.state_buffers, shards.cohort_of, groups, enter, find_problem())
            self._gather()
            yield
            self._leave(leave)
        except BaseException:
            # The block has raised, or a signal or a lack of memory has interrupted this rank on its way in or out.
            if self.is_swapped and not self._exit_failed:
                self._exit_failed = True
                self._leave(leave)
            raise
        finally:
            # After an exit that has failed the parameters are still the averages, which nobody may train.
            if not self.is_swapped:
                self._forget()

    @public_call
    def _enter(
        self,
        state_buffers: Sequence[StateBuffer],
        cohort_of: dict[int, Cohort],
        groups: Sequence[dict[str, Any]],
        enter: Agree,
        problem: Exception | None,
    ) -> None:
        """Exchange this rank's fragments, and agree with all ranks that they have done so. Collective.

        Nothing is sent before the agreement: if any rank has failed, each undoes its own exchanges.
        """
        interruption: BaseException | None = problem
        try:
            try:
                if problem is None:
                    self._exchange_all(state_buffers, cohort_of, groups)
            except BaseException as error:
                interruption = error
            enter(_as_problem(interruption))
        except BaseException as error:
            self._undo_all()
            self._forget()
            if interruption is not None and not isinstance(interruption, Exception):
                raise interruption from None
            raise error

    @labelled(Label.SWAP)
    @torch.no_grad()
    def _exchange_all(
        self, state_buffers: Sequence[StateBuffer], cohort_of: dict[int, Cohort], groups: Sequence[dict[str, Any]]
    ) -> None:
        """Put the averages in place of this rank's fragments of the parameters. Not collective."""
        # Once for each cohort: its scalars may be on a device, which the host waits for.
        has_begun = {cohort: cohort.begun for cohort in set(cohort_of.values())}
        problem = self.start.problem("averaged_parameters()", "the parameters stay the last iterate", has_begun, groups)
        if problem is not None:
            raise problem
        self.is_swapped = True
        self._in_place.add(self)
        for buffer in state_buffers:
            # Cohorts are the same on all ranks, and so is the decision which state buffers are gathered.
            begun = [member for member in buffer.members if has_begun[cohort_of[member.index]]]
            if not begun:
                continue
            self._buffers.append(buffer)
            self._begun += begun
            # Those of a ShardedASGD, if these are of a ShardedAverage beside it. Own ones only if somebody has set mu:
            # the step at whose end averaging begins gives them their values.
            AverageMemory.before_swap(member.param for member in begun)
            mark_written([member.param for member in begun])
            for member in begun:
                if member.fragment.numel:
                    same_dtype = buffer.average.dtype == buffer.dtype
                    exchange = FragmentExchange(member, self._updater) if same_dtype else FragmentCopy(member)
                    self._exchanges.append(exchange)
                    exchange.run()

    @public_call
    @torch.no_grad()
    def _leave(self, leave: Agree) -> None:
        """Bring the parameters back, bit for bit. Collective; goes on from where an earlier call was interrupted."""
        failure: Exception | None = None
        if not self._leaving:
            # The other ranks wait for the gathers of entering, if this one was interrupted in them.
            self._gather()
            try:
                leave(self._follow_moved())
            except (CallsDiffer, PeerError):
                # Other ranks are not on their way out: a gather would hang, so the averages stay.
                self._exit_failed = True
                raise
            except Exception as error:
                # Raised on all ranks alike, so all bring the parameters back before they raise it.
                failure = error
            self._leaving, self._num_gathered = True, 0
        self._undo_all()
        self._gather()
        self._forget()
        if failure is not None:
            raise failure

    @torch.no_grad()
    def _follow_moved(self) -> Exception | None:
        """Follow state and parameters that were moved inside the block; returns the error of what cannot be followed.

        Without it the parameters would be brought back to memory that they have left. (``flatten_parameters()`` of
        ``nn.LSTM`` rebinds them in a forward.)
        """
        assert self._shards is not None
        for member in self._begun:
            # What it has elsewhere is a copy of the average, which its slot holds, too.
            if isinstance(member, BucketParam) and member.is_rebound:
                member.bring_home(keep_slot=True)
        try:
            self._shards.follow_presharded()
            self._shards.follow_state()
        except RuntimeError as error:
            return error
        return None

    @labelled(Label.SWAP)
    @torch.no_grad()
    def _undo_all(self) -> None:
        mark_written([member.param for member in self._begun])
        for exchange in self._exchanges:
            # First, as all exchanges share the scratch memory that holds a torn tile.
            exchange.mend()
        for exchange in self._exchanges:
            exchange.undo()

    @torch.no_grad()
    def _gather(self) -> None:
        """Bring every rank's shards of the parameters to all, as far as an earlier call has not. Collective."""
        while self._num_gathered < len(self._buffers):
            buffer = self._buffers[self._num_gathered]
            self._gatherer.launch(buffer)
            self._num_gathered += 1
            buffer.on_params_written()
        self._gatherer.wait()

    def _forget(self) -> None:
        self._buffers, self._exchanges, self._begun, self._num_gathered = [], [], [], 0
        self._leaving = self._exit_failed = self.is_swapped = False
        self._in_place.discard(self)
        if self._refusal is not None:
            self._refusal.remove()
            self._refusal = None


def _refuse_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Refuse the step of any optimizer that would train averages instead of parameters; a hook before it."""
    params = (param for group in optimizer.param_groups for param in group["params"])
    Averages.refuse_swapped(f"step() of {type(optimizer).__name__}", params)


def refuse_differentiable() -> NoReturn:
    """Raise the RuntimeError of ``averaged_parameters()`` with ``differentiable=True``."""
    raise RuntimeError(
        "dist_asgd: averaged_parameters() with differentiable=True would cut autograd's graph. Read "
        "optimizer.state[p]['ax'], which has the parameter's shape in this mode."
    )


def average_from_now(groups: Sequence[dict[str, Any]], state: dict[Any, Any]) -> None:
    """Set ``t0`` of every group to its current step; ``start_averaging()`` does so."""
    for group in groups:
        # Frozen parameters have no entry; torch's own state is a dict that would make one.
        entries = [state.get(param, {}) for param in group["params"]]
        group["t0"] = max((peek(entry, "step").item() for entry in entries if "step" in entry), default=0.0)


def num_averaged(groups: Sequence[dict[str, Any]], state: dict[Any, Any]) -> int:
    """Return how many iterates the averages in ``state`` hold, the most of all parameters."""
    found = [0]
    for group in groups:
        # Parameters of one cohort share the tensor.
        entries = [entry for param in group["params"] if "step" in (entry := state.get(param, {}))]
        steps = {id(step): step for step in (peek(entry, "step") for entry in entries)}
        schedule = AverageSchedule(group.get(AVERAGE_KEY))
        found += [schedule.num_iterates(step.item(), group["t0"]) for step in steps.values()]
    return max(found)


def _as_problem(error: BaseException | None) -> Exception | None:
    """``error`` as the other ranks are told of it."""
    if error is None or isinstance(error, Exception):
        return error
    return RuntimeError(f"dist_asgd: averaged_parameters() was interrupted on this rank by {type(error).__name__}.")
