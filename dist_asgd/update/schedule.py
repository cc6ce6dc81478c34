"""What a step updates with: each group's hyperparameters, and each cohort's ``step``, ``eta`` and ``mu``.

A cohort is a set of parameters of one group that have taken the same steps and share their scalars. A group begins as
one cohort; parameters that skip a step leave it and become another. So the schedule costs a few operations for each
cohort and step, however many parameters there are.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from . import backend
from .scalars import HostBound, ScalarTable
from .weights import AVERAGE_KEY, AverageSchedule

TORCH_SCHEDULE = AverageSchedule()
# The largest count that float32 reaches in steps of one.
MAX_FLOAT32_COUNT = 1 << 24


def scalar_dtype() -> torch.dtype:
    """The dtype of ``step``, ``eta`` and ``mu``: float64 if that is torch's default dtype, else float32."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


class Implementation(Enum):
    """Which of torch's forms the arithmetic follows to the bit, and what computes it.

    FORLOOP  torch's for-loop form, in tiles of torch operators (reference.py)
    FOREACH  torch's foreach form, in tiles of torch operators (foreach.py)
    FUSED    the for-loop form, in one pass of a compiled kernel (kernel.c, cuda.py)

    Of ``ShardedAverage``, which leaves parameters as they are, in the forms of torch.optim.swa_utils (means.py):
    LERP     ``_foreach_lerp_``, as get_ema_multi_avg_fn and get_swa_multi_avg_fn call it
    MEAN     the formulas of get_ema_avg_fn and get_swa_avg_fn
    """

    FORLOOP = 1
    FOREACH = 2
    FUSED = 3
    LERP = 4
    MEAN = 5

    @classmethod
    def of(cls, group: dict[str, Any], device_type: str | None) -> Implementation:
        """The implementation of a parameter group by its ``foreach`` and ``fused``; by default the fastest.

        ``device_type`` is that of the group's parameters, None if it has none.
        """
        if group["foreach"]:
            return cls.FOREACH
        fused = group.get("fused")
        if fused:
            return cls.FUSED
        if group["foreach"] is False:
            return cls.FORLOOP
        if device_type in (None, "cpu"):
            return cls.FORLOOP if fused is False else cls.FUSED
        return cls.FOREACH


@dataclass(frozen=True, slots=True)
class StepHyperparameters:
    """The hyperparameters of one group for one step, read when the step begins.

    device      where the group's scalars are kept and advanced; None is the host
    capturable  whether a CUDA graph may repeat steps, of which the host sees nothing
    """

    lr: float | Tensor
    lambd: float
    alpha: float
    t0: float
    weight_decay: float
    maximize: bool
    implementation: Implementation
    device: torch.device | None = None
    average: AverageSchedule = TORCH_SCHEDULE
    capturable: bool = False

    @classmethod
    def of(
        cls, group: dict[str, Any], implementation: Implementation, device: torch.device | None = None
    ) -> StepHyperparameters:
        """The hyperparameters of ``group`` as they are now; a Tensor lr becomes 0-dim in its dtype, as in torch."""
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.dim() != 0:
            lr = lr.squeeze()
        return cls(
            lr,
            group["lambd"],
            group["alpha"],
            group["t0"],
            group["weight_decay"],
            group["maximize"],
            implementation,
            device,
            AverageSchedule(group[AVERAGE_KEY]) if AVERAGE_KEY in group else TORCH_SCHEDULE,
            group["capturable"],
        )


def step_hyperparameters(groups: Sequence[dict[str, Any]], leads: Sequence[Tensor | None]) -> list[StepHyperparameters]:
    """The hyperparameters of each group as they are now; called once at each step.

    ``leads`` has a parameter of each group that can step; None if the group has none.
    """
    hypers = []
    for group, first in zip(groups, leads, strict=True):
        implementation = Implementation.of(group, None if first is None else first.device.type)
        on_device = (
            implementation is Implementation.FUSED and first is not None and backend.of(first.device) is backend.TRITON
        )
        hypers.append(
            StepHyperparameters.of(group, implementation, first.device if first is not None and on_device else None)
        )
    return hypers


class Cohort:
    """The scalars of one cohort: 0-dim tensors, the very objects that ``optimizer.state[p]`` holds.

    step, eta, mu  on the host, or views of line ``row`` of a ``ScalarTable`` on the device; ``row`` is None on the host
    indices        the parameters of the cohort, in registration order
    fresh          True until the first step: torch has no state for such parameters yet, and will take eta from the
                   lr of that step
    initial        as ``fresh``, for scalars on the device: it stays True, and the kernel looks whether step is 0
    bound          what the host knows of scalars on the device; None if they never were there
    """

    __slots__ = ("bound", "eta", "fresh", "indices", "initial", "mu", "row", "step")

    def __init__(self, step: Tensor, eta: Tensor, mu: Tensor, indices: Iterable[int], fresh: bool = False) -> None:
        self.step = step
        self.eta = eta
        self.mu = mu
        self.indices = set(indices)
        self.fresh = fresh
        self.row: int | None = None
        self.bound: HostBound | None = None
        # The host does not learn whether a first step overflowed and was skipped on the device.
        self.initial = False

    @classmethod
    def new(cls, lr: float | Tensor, indices: Iterable[int]) -> Cohort:
        """A cohort that has not stepped: step 0, eta = lr, mu = 1."""
        dtype = scalar_dtype()
        # Scalars are on the host even if torch's default device is another.
        step, eta, mu = (torch.tensor(value, dtype=dtype, device="cpu") for value in (0.0, 0.0, 1.0))
        cohort = cls(step, eta, mu, indices, fresh=True)
        cohort._set_first_eta(lr)
        return cohort

    def _set_first_eta(self, lr: float | Tensor) -> None:
        if isinstance(lr, Tensor):
            self.eta.copy_(lr.detach().reshape(()))
        else:
            self.eta.fill_(lr)

    def split(self, indices: set[int]) -> Cohort:
        """Move ``indices`` to a new cohort with copies of the scalars, and return it."""
        self.indices -= indices
        taken = Cohort(self.step.clone(), self.eta.clone(), self.mu.clone(), indices, self.fresh)
        taken.initial = self.initial
        taken.bound = None if self.bound is None else replace(self.bound)
        return taken

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the scalars by key, on the host, in torch's dtypes; waits for the device if they are on one."""
        scalars = {"step": self.step, "eta": self.eta, "mu": self.mu}
        if self.row is None:
            return {key: scalar.clone() for key, scalar in scalars.items()}
        on_host = {key: scalar.cpu() for key, scalar in scalars.items()}
        counted = on_host["step"].item() <= MAX_FLOAT32_COUNT
        return {key: v.to(scalar_dtype()) if key != "step" or counted else v for key, v in on_host.items()}

    def move_to_host(self) -> None:
        """Replace scalars on a device by copies on the host, before a step by another implementation; waits for it."""
        scalars = self.snapshot()
        self.step, self.eta, self.mu, self.row = scalars["step"], scalars["eta"], scalars["mu"], None
        self.bound = None
        self.fresh = self.initial and self.step.item() == 0

    def follow(self) -> bool:
        """Look for scalars on the host that a user has replaced in place; False if one cannot be used.

        They are read through their objects, so that new memory is no problem.
        """
        scalars = (self.step, self.eta, self.mu)
        return all(s.dim() == 0 and s.device.type == "cpu" and s.dtype.is_floating_point for s in scalars)

    @property
    def begun(self) -> bool:
        """Whether ``ax`` of the parameters is a mean of iterates, and not zeros or a copy of the last iterate."""
        return not self.fresh and self.mu.item() != 1

    def only_copies(self, hyper: StepHyperparameters) -> bool:
        """Whether mu is 1 in the next step, and in the one after it; False if the host does not know. No waits."""
        if self.bound is not None:
            return self.bound.only_copies(hyper)
        return self.mu.item() == 1 and hyper.average.next_mu(self.step.item() + 1, hyper.t0) == 1

    def note_shown(self) -> None:
        """Note that somebody may write the scalars from now on; those on the host are read in each step."""
        if self.bound is not None:
            self.bound.is_shown = True

    def prepare(self, lr: float | Tensor) -> None:
        """Before the first step, take eta from the lr of now: torch makes it when the first gradient comes."""
        if self.fresh:
            self.preview(lr)
            self.fresh = False

    def preview(self, lr: float | Tensor) -> None:
        """Take eta from the lr of now, for a first step that some of the parameters may take."""
        # torch takes the default dtype of the first step; in place, so that state[p] keeps the same objects.
        for scalar in (self.step, self.eta, self.mu):
            scalar.data = scalar.to(scalar_dtype())
        self._set_first_eta(lr)

    def factors(self, hyper: StepHyperparameters) -> tuple[float, float, float, float]:
        """The row (c, -eta, mu, t) that a kernel updates with, c = 1 - lambd * eta; in double precision."""
        eta = self.eta.item()
        return 1 - hyper.lambd * eta, -eta, self.mu.item(), self.step.item() + 1

    def advance(self, hyper: StepHyperparameters) -> None:
        """After step t: ``step <- t``, ``eta <- lr / (1 + lambd * lr * t)^alpha``, ``mu <- 1 / max(1, t - t0)``.

        Another rule of averaging has another ``mu``, see weights.py.

        As in torch, the for-loop form computes eta in double precision and the foreach form on 0-dim tensors: the two
        differ in about half of the steps by one unit in the last place.
        """
        if self.step.dtype == torch.float32 and self.step.item() >= MAX_FLOAT32_COUNT:
            # float32 counts no further, and torch's counter stops here; averaging needs the true count.
            self.step.data = self.step.double()
        self.step += 1
        step = self.step.item()
        t: float | Tensor = self.step if hyper.implementation is Implementation.FOREACH else step
        _set(self.eta, hyper.lr / ((1 + hyper.lambd * hyper.lr * t) ** hyper.alpha))
        _set(self.mu, hyper.average.next_mu(step, hyper.t0))


def _set(scalar: Tensor, value: float | Tensor) -> None:
    """Set a 0-dim ``scalar`` on the host to ``value``, which torch would make a tensor of its default dtype first."""
    if isinstance(value, float) and scalar.dtype == torch.get_default_dtype():
        # One operator in place of two, as nothing is rounded in between.
        scalar.fill_(value)
    else:
        scalar.copy_(torch.as_tensor(value, device="cpu"))


class Cohorts:
    """All cohorts of one optimizer, by parameter group; it knows parameters by their index in registration order.

    ``by_index`` maps each parameter's index to its cohort and stays the same dict. ``ParamShards`` owns the one
    instance; ``step()`` calls ``begin_step`` and ``scalars`` before the update and ``end_step`` after it.
    """

    def __init__(self) -> None:
        self.by_index: dict[int, Cohort] = {}
        # Whether no parameter has stepped, nor got the state of a step from a state dict.
        self.is_fresh = True
        self._groups: list[list[Cohort]] = []
        # The group of each parameter.
        self._group_of: list[int] = []
        # The scalars of groups that the device advances, by group.
        self._tables: dict[int, ScalarTable] = {}
        # The parameters that took the last step; None if cohorts have changed since.
        self._last_active: frozenset[int] | None = None
        # Cohorts that a preview has given an eta, with the one that they had.
        self._previewed: list[tuple[Cohort, Tensor]] = []

    def follow(self, name_of: Callable[[int], str]) -> None:
        """Follow published scalars that were moved to other memory. Called before each use; not collective.

        RuntimeError if they are no scalars of their device any more; ``name_of`` names a parameter for it.
        """
        for cohorts in self._groups:
            for cohort in cohorts:
                if not (cohort.follow() if cohort.row is None else self._tables_follow(cohort)):
                    raise RuntimeError(
                        f"dist_asgd: step, eta or mu of parameter {name_of(min(cohort.indices))} was replaced in place "
                        f"by a tensor of another shape, dtype or device. Change its value only (eta.fill_()), or call "
                        f"load_state_dict()."
                    )

    def _tables_follow(self, cohort: Cohort) -> bool:
        return self._tables[self._group_of[min(cohort.indices)]].follow(cohort)

    def scalar_values(self) -> list[tuple[float, float]]:
        """(step, mu) of every cohort, each value once and in order; waits for devices that scalars are on."""
        found = {(cohort.step.item(), cohort.mu.item()) for cohorts in self._groups for cohort in cohorts}
        return sorted(found)

    def of_group(self, group_index: int) -> Sequence[Cohort]:
        """The cohorts of a group."""
        return self._groups[group_index]

    def num_steps(self) -> float:
        """The steps of the cohort that has taken most; waits for the device if its scalars are on one."""
        return max((cohort.step.item() for cohorts in self._groups for cohort in cohorts), default=0.0)

    def add_group(self, lr: float | Tensor, num_params: int) -> None:
        """Append a group of ``num_params`` parameters, which share a cohort that has not stepped."""
        group_index, first = len(self._groups), len(self._group_of)
        self._groups.append([])
        self._group_of += [group_index] * num_params
        if num_params:
            self._add(Cohort.new(lr, range(first, first + num_params)), group_index)

    def replace(self, cohorts: Sequence[Cohort]) -> None:
        """Take the cohorts of a loaded state dict, which have all parameters and keep their scalars on the host."""
        self.is_fresh = True
        self._groups = [[] for _ in self._groups]
        self._tables.clear()
        for cohort in cohorts:
            self._add(cohort, self._group_of[min(cohort.indices)])

    def _add(self, cohort: Cohort, group_index: int) -> None:
        self.is_fresh &= cohort.fresh
        self._groups[group_index].append(cohort)
        for index in cohort.indices:
            self.by_index[index] = cohort
        self._last_active = None

    def preview(self, hypers: Sequence[StepHyperparameters]) -> bool:
        """Let the rows of ``scalars`` be right for first steps, before it is known which parameters take one.

        Returns whether there are cohorts that have not stepped. ``end_preview`` is called after the step.
        """
        self.end_preview()
        fresh = [
            (cohort, hyper) for of, hyper in zip(self._groups, hypers, strict=True) for cohort in of if cohort.fresh
        ]
        for cohort, hyper in fresh:
            self._previewed.append((cohort, cohort.eta.clone()))
            cohort.preview(hyper.lr)
        return bool(fresh)

    def end_preview(self) -> None:
        """Give cohorts that still have not stepped the eta back that they had."""
        for cohort, eta in self._previewed:
            if cohort.fresh:
                cohort.eta.copy_(eta)
        self._previewed.clear()

    def begin_step(self, active: frozenset[int], hypers: Sequence[StepHyperparameters]) -> Iterator[Iterable[int]]:
        """Make every cohort step as a whole, with its scalars where its group's implementation needs them.

        A cohort of which only some parameters step is split; scalars move to the device or back where the
        implementation has changed; a first step takes its eta from the lr of now. Yields the indices of parameters
        whose scalars became other tensors, each time before anything else can fail: to be iterated to the end.
        """
        for group_index, hyper in enumerate(hypers):
            # Where the same parameters step as in the last step, no cohort can need a split.
            for cohort in list(self._groups[group_index]) if active is not self._last_active else ():
                stepping = cohort.indices & active
                if stepping and stepping != cohort.indices:
                    if hyper.device is None and cohort.row is not None:
                        # Halves of a row of the device would not be found to be there.
                        cohort.move_to_host()
                        yield cohort.indices
                    self._add(cohort.split(stepping), group_index)
                    yield stepping
            for cohort in self._groups[group_index]:
                if not cohort.indices.isdisjoint(active):
                    hyper.average.check(cohort.step, hyper.t0)
                    if (hyper.device is not None) != (cohort.row is not None):
                        self._move(cohort, group_index, hyper.device)
                        yield cohort.indices
                    cohort.prepare(hyper.lr)
        self._last_active = active
        self.is_fresh &= not active

    def _move(self, cohort: Cohort, group_index: int, device: torch.device | None) -> None:
        if device is None:
            cohort.move_to_host()
            return
        if group_index not in self._tables:
            self._tables[group_index] = ScalarTable(self._group_of.count(group_index), device)
        self._tables[group_index].adopt(cohort)

    def host_rows(self) -> dict[Cohort, int]:
        """The line of each cohort in the rows that ``scalars`` returns."""
        return {cohort: row for row, cohort in enumerate(cohort for group in self._groups for cohort in group)}

    def device_rows(self) -> dict[Cohort, int]:
        """The line of each cohort whose scalars are on a device in the ``ScalarTable`` of its group."""
        return {cohort: cohort.row for group in self._groups for cohort in group if cohort.row is not None}

    def scalars(
        self, active: frozenset[int], hypers: Sequence[StepHyperparameters], found_inf: Tensor | None
    ) -> tuple[array[float], dict[int, Tensor]]:
        """The scalars that this step updates with, from the host and from devices; waits for no device.

        Returns ``Cohort.factors`` of every cohort, 4 doubles each, zeros if the device has them; and
        ``ScalarTable.factors`` by group, whose scalars advance to the next step's by this call. With ``found_inf``,
        ``(1,)`` float32 on the device, nonzero, they do not advance.
        """
        rows = array("d")
        for cohorts, hyper in zip(self._groups, hypers, strict=True):
            for cohort in cohorts:
                rows.extend(cohort.factors(hyper) if cohort.row is None else (0.0,) * 4)
        tables = {group: table for group, table in self._tables.items() if hypers[group].device is not None}
        for group, table in tables.items():
            table.advance(hypers[group], active, found_inf)
        return rows, {group: table.factors for group, table in tables.items()}

    def end_step(self, active: frozenset[int], hypers: Sequence[StepHyperparameters]) -> None:
        """Advance the scalars on the host of all parameters that stepped, after the update."""
        for cohorts, hyper in zip(self._groups, hypers, strict=True):
            for cohort in cohorts:
                if cohort.row is None and not cohort.indices.isdisjoint(active):
                    cohort.advance(hyper)
