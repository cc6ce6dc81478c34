"""``ShardedState``: an optimizer's parameters and sharded state, without the step; the base of the two public classes.

``ShardedASGD`` adds gradients, the update and the gather of a step; ``ShardedAverage`` adds ``update()``, which leaves
the parameters alone. Attributes without an underscore (``shards``, say) are for the rooms above, ``checkpoint`` and
``amp``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from . import memory
from .averaging import Averages, average_from_now, num_averaged, refuse_differentiable
from .averaging_start import StartNotice
from .backward_checks import check_step_in_backward
from .comm import CollectiveCall
from .comm.agreement import NO_FINGERPRINT, public_call
from .fingerprints import Hyperparameters, checked_fingerprint, groups_fingerprint
from .gather import Gatherer
from .gradients.base import Gradients
from .joining import method_of_torch, refuse_pickling
from .placements import fsdp1
from .placements.leaves import naming_non_leaves
from .precision_checks import check_precision_fits
from .registry import ParamRegistry
from .state import ParamShards
from .state_dict.state_dicts import StateDicts
from .storage.average import write_averages
from .storage.frozen import is_held
from .storage.precision import Precision
from .update import differentiable
from .update.offload import Offload
from .update.operators import Updater
from .update.schedule import StepHyperparameters, step_hyperparameters
from .validation import check_new_group, params_of


class ShardedState(torch.optim.Optimizer):
    """Parameters with an average, and the scalars ``step``, ``eta`` and ``mu``, sharded over ranks.

    A subclass calls ``_construct`` in its constructor, once all that it needs is there.
    """

    # True for trainers that save on rank 0 alone: several ranks then need consolidate_state_dict() before state_dict().
    whole_state_dicts_only = False
    __getstate__ = refuse_pickling

    shards: ParamShards
    # Whether plain parameters are moved into buckets, which this optimizer then gathers after each step.
    _moves_params = True
    is_differentiable = False

    def _construct(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        gradients: Gradients,
        precision: Precision,
        options: dict[str, Any],
        check: Callable[[], None],
    ) -> None:
        """Check everything, agree with all ranks, and build the shards. Collective.

        Args:
            params, defaults: for the constructor of torch's ``Optimizer``.
            gradients: how this optimizer gets gradients; it has the communicators and the agreement.
            precision: the dtypes of state.
            options: the constructor's own options: plain values, which ranks compare.
            check: raises ValueError if an option is not supported.
        """
        self.gradients = gradients
        self.communicators = gradients.communicators
        self._updater = Updater()
        self.gatherer = Gatherer(self.communicators)
        start = StartNotice(is_first_rank=self.communicators.rank == 0, counts_updates=not self._moves_params)
        self.averages = Averages(self._updater, self.gatherer, start)
        self._precision = precision
        self._options = options
        self._hyperparameters = Hyperparameters()
        self._constructed = False
        problem = self.communicators.problem
        try:
            check()
            torch.optim.Optimizer.__init__(self, params, defaults)
            check_precision_fits(self._precision, self.param_groups)
        except Exception as error:
            problem = problem or error
        try:
            # Every rank raises here if any has a problem or other arguments; nothing has been moved or made yet.
            self._agree_on_groups(CollectiveCall.CONSTRUCT, 0, problem)
        finally:
            del problem  # its traceback refers to this frame
        self._constructed = True
        self.communicators.share_control()
        self.shards = ParamShards(
            self.communicators,
            self.state,
            options["bucket_cap_mb"],
            self._min_buckets(),
            self._precision,
            options["shard_replicated"],
            self._moves_params,
        )
        check_again = partial(
            checked_fingerprint, self._options, self.communicators, self._precision, self._options["stage"]
        )
        self.registry = ParamRegistry(
            self.state, self.shards, self.gradients, self.gatherer, self._updater, check_again
        )
        self._add_storage(0)
        shards = None if self.is_differentiable else self.shards
        self._state_dicts = StateDicts(self, shards, self.communicators, self.gatherer)

    def _min_buckets(self) -> int:
        """Into how many buckets parameters are divided at least."""
        return 1

    # --- construction --------------------------------------------------------------------------------------

    @public_call
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with hyperparameters of its own. Collective; if any rank raises, all do and nothing changes."""
        if not self._constructed:
            # The base constructor adds the first groups one by one; ranks compare them all at once, later.
            self._add_checked(param_group)
            return
        self.averages.refuse_inside("add_param_group()")
        self.adopt_params()
        first, problem = len(self.param_groups), None
        try:
            try:
                self._add_checked(param_group)
            except Exception as error:
                problem = error
            self._agree_on_groups(CollectiveCall.ADD_PARAM_GROUP, first, problem)
        except BaseException:
            del self.param_groups[first:]
            raise
        self._add_storage(first)

    def _add_checked(self, param_group: dict[str, Any]) -> None:
        with naming_non_leaves(param_group, len(self.param_groups)):
            method_of_torch("add_param_group")(self, param_group)
        options = self.communicators, self._precision, self.is_differentiable, self._options["stage"]
        check_new_group(self.param_groups, *options, partial(is_held, state=self.state))
        check_step_in_backward(self._options, self.param_groups)

    @public_call
    def _agree_on_groups(self, call: CollectiveCall, first: int, problem: Exception | None) -> None:
        fingerprint = groups_fingerprint(self._options, [] if problem else self.param_groups, first)
        self.gradients.agree(call, fingerprint, problem)

    def _add_storage(self, first_group: int) -> None:
        """Give the groups from ``first_group`` on their buckets and their state."""
        if not self.is_differentiable:
            self.registry.add_groups(self.param_groups, first_group)
            return
        differentiable.init_states(self.param_groups[first_group:], self.state)

    def adopt_params(self) -> None:
        """Take parameters and ``param_groups`` as they are now; see ``registry.py``. Collective if they were changed.

        Called first in every call that uses the parameters, also by ``checkpoint``.
        """
        Offload.before_write()
        self._adopt()

    def _adopt(self) -> None:
        """Do so in a call that writes no parameters unless they were changed."""
        self.gatherer.wait()
        if self.is_differentiable or self.averages.is_swapped or self.shards.hold(self.param_groups):
            return
        Offload.before_write()
        self._state_dicts.forget_averages()
        self.registry.adopt(self.param_groups)

    # --- checks ----------------------------------------------------------------------------------------------

    def _problem(self, before_load: bool = False, ends_step: bool = False) -> Exception | None:
        """What is wrong on this rank with parameters, state or (before a load replaces them) hyperparameters."""
        try:
            self.shards.check_unchanged(self.state)
            if not before_load:
                self._check_whole(ends_step)
                self._hyperparameters.check(self.param_groups, self.shards.devices_of)
        except Exception as error:
            return error
        return None

    def _step_problem(self, by_gradients: bool) -> Exception | None:
        """What is wrong on this rank with a step that begins; lack of memory for averages that it writes is, too.

        With ``by_gradients`` the parameters step that have a gradient on some rank, else all.
        """
        # No variable of this frame holds a problem, whose traceback would refer to the frame.
        return self._problem(ends_step=True) or self._room_problem(by_gradients)

    def _room_problem(self, by_gradients: bool) -> Exception | None:
        try:
            has_gradient = self.gradients.has_gradient if by_gradients else None
            self.shards.make_room(self._step_hyperparameters, has_gradient)
        except Exception as error:
            return error
        return None

    def _step_hyperparameters(self) -> list[StepHyperparameters]:
        """What a step of now updates with, by group."""
        return step_hyperparameters(self.param_groups, self.shards.leads)

    def _check_whole(self, ends_step: bool) -> None:
        """Raise RuntimeError if a call was interrupted while it wrote; ``ends_step``: the caller is ``step()``."""
        self.shards.check_whole()

    @public_call
    def wait_for_parameters(self) -> None:
        """Wait until all parameters have arrived here, for those who read them past the modules. Not collective."""
        self.gatherer.wait()

    # --- the average ---------------------------------------------------------------------------------------

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Put the averaged weights ``ax`` in place of the parameters inside the block, on every rank.

        Afterwards the parameters are back, bit for bit. Collective on entry and on exit, also when an exception leaves
        the block. There is no second copy of the model: parameters and averages change places. If ``ax`` is wider than
        the parameters (16-bit ones), each rank sets its own shard of them aside. Parameters whose averaging has not
        begun (step <= t0) stay, and so do buffers of modules. Inside, calls that read the state are refused.
        """
        if self.is_differentiable:
            refuse_differentiable()
        self.adopt_params()
        fsdp1.refuse("averaged_parameters()", params_of(self.param_groups), fsdp1.LOAD_AVERAGES)
        with self.averages.in_place(self.shards, self.param_groups, self.gradients.agree, self._problem):
            yield

    def start_averaging(self) -> None:
        """Set ``t0`` of every group to its current step, so that averaging begins now.

        No communication; call it at the same step on every rank. The next step still copies the parameters (mu is
        stored), and ``ax`` is the mean of the iterates from the step after it on.
        """
        self.averages.refuse_inside("start_averaging()")
        average_from_now(self.param_groups, self.state)

    def averaged_steps(self) -> int:
        """Return how many iterates the average holds; 0 before averaging has begun. Not collective.

        If parameters have skipped steps, it is the number of the one that has skipped least. With other rules than the
        mean it is how many have entered, with whatever weight. Scalars on a device are waited for.
        """
        return num_averaged(self.param_groups, self.state)

    # --- state ---------------------------------------------------------------------------------------------

    @public_call
    def state_dict(self) -> dict[str, Any]:
        """Hand out this rank's fragments of the state, without communication and without a copy of ``ax``.

        On several ranks ``state[i]["ax"]`` is a ``ShardTensor``: it has the parameter's shape, and ``to_local()`` is
        this rank's fragment, which goes on changing as the optimizer steps. ``torch.distributed.checkpoint`` saves and
        loads it at any world size; it refuses to be taken for a whole tensor. Of a DTensor ``ax`` is a DTensor. Beside
        parameters of FSDP1, whose helpers take all else for whole, it is collective and the other state is whole.
        """
        if not self._state_dicts.for_fsdp1():
            self.shards.check_whole()
        gathered = self._state_dicts.take_consolidated(self.whole_state_dicts_only)
        return self.live_state(shown=True) if gathered is None else gathered

    def live_state(self, fresh: bool = False, shown: bool = False, saved: bool = False) -> dict[str, Any]:
        """This rank's fragments, torn or not, with ``fresh`` also of frozen parameters that never stepped.

        ``shown``: they are for somebody who may keep them. ``saved``: they are only read, and before the parameters
        are written; where parameters stand for their averages, ``ax`` is the parameter then.
        """
        self.averages.refuse_inside("state_dict()")
        self.adopt_params()
        if not saved:
            write_averages(self.shards.state_buffers, shown)
        return self._state_dicts.sharded(partial(self.gradients.agree, CollectiveCall.STATE_DICT), fresh)

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Make the next ``state_dict()`` on rank ``to`` the whole, unless a step or load comes before. Collective."""
        self._state_dicts.consolidated = self.consolidated_state_dict(to)

    @public_call
    def consolidated_state_dict(self, to: int | None = 0) -> dict[str, Any]:
        """Gather the whole state in ``torch.optim.ASGD``'s own layout, on the CPU. Collective.

        It is returned on rank ``to`` of the process group (None: on all ranks), where state-dict hooks run; the other
        ranks get ``{}``. Rank ``to`` holds the result and one bucket, the others what they already had.
        """
        self.averages.refuse_inside("consolidated_state_dict()")
        self.adopt_params()
        fsdp1.refuse("consolidated_state_dict()", params_of(self.param_groups), fsdp1.CALL_FSDP1)
        if not self.is_differentiable:
            fingerprint, problem = self._state_dicts.before_full(to)
            self.gradients.agree(CollectiveCall.CONSOLIDATED_STATE_DICT, fingerprint, problem)
        return self._state_dicts.full(to)

    @public_call
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` gave this rank, a consolidated dict, or one of ``torch.optim.ASGD``. Collective.

        Whole dicts load at any world size and on any layout; every rank passes the same. Nothing is cast to a
        narrower dtype, and ``state_dict`` is not changed. If any rank raises, all do, and nothing changes.
        Hyperparameters come from the dict, as in torch; ``capturable`` and ``differentiable`` stay this optimizer's.
        """
        self.averages.refuse_inside("load_state_dict()")
        self.adopt_params()
        problem = self._problem(before_load=True)
        loaded, fingerprint, unreadable = self._state_dicts.parse(state_dict)
        self.gradients.agree(CollectiveCall.LOAD_STATE_DICT, fingerprint, problem or unreadable)
        if loaded is not None and self.registry.take_in(self.param_groups, loaded.stepped):
            loaded, fingerprint, unreadable = self._state_dicts.parse(loaded.source, run_hooks=False)
            self.gradients.agree(CollectiveCall.LOAD_STATE_DICT, fingerprint, unreadable)
        if loaded is not None:
            agree = partial(self.gradients.agree, CollectiveCall.LOAD_STATE_DICT, NO_FINGERPRINT)
            self._state_dicts.load(loaded, agree)

    def memory_report(self) -> memory.MemoryReport:
        """Count the bytes held on this rank, beside those that ``torch.optim.ASGD`` would hold. Not collective."""
        in_flight = self._updater.scratch_bytes + self.communicators.scratch_bytes() + self.gatherer.scratch_bytes
        buffers, in_flight = self.shards.state_buffers, in_flight + self.gradients.in_flight_bytes
        return memory.report(buffers, in_flight, has_gradients=self._moves_params)
