"""The subject: it runs a history with ``ShardedASGD`` on every rank, and compares with the oracle after each event."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from dist_asgd import ShardedASGD
from tests.harness.bits import assert_same_bits, same_tree
from tests.harness.history import (
    DTYPES,
    AddGroup,
    Event,
    GroupSpec,
    History,
    Reload,
    SetLr,
    SetT0,
    SetTrained,
    StartAveraging,
    Step,
    exact_share,
    like,
    make_params,
    mean_gradient,
    ranks_of,
    shares,
)
from tests.harness.meshes import hybrid_mesh, whole
from tests.harness.oracle import Oracle, group_dict, set_lr
from tests.harness.placements import Placements, held, loads_in_full, placed_like


@dataclass(frozen=True)
class Setting:
    """The optimizer's options in a history. ``placement`` is one of ``placements.KINDS``; None: plain parameters.

    ``overlap``: the parameters are read through modules, which wait for gathers that ``step()`` has left in flight.
    ``in_backward``: all but the last backward of a step are inside ``no_sync()``.
    """

    stage: int = 1
    form: str = "forloop"
    bucket_cap_mb: float = 25.0
    masters: bool = False
    mesh: tuple[int, int] | None = None
    placement: str | None = None
    shard_replicated: bool = True
    overlap: bool = False
    in_backward: bool = False

    @property
    def forms(self) -> dict[str, bool]:
        """The optimizer's options for the implementation ``form``: forloop, foreach or fused."""
        return {"foreach": self.form == "foreach", "fused": self.form == "fused"}


@dataclass(frozen=True)
class Saved:
    """The state of a history after ``num_events``: whole parameters and the consolidated optimizer state."""

    num_events: int
    params: list[Tensor]
    state: dict[str, Any]


def check_history(
    rank: int,
    world_size: int,
    history: History,
    setting: Setting,
    stop_after: int | None = None,
    resume: Saved | None = None,
) -> Saved:
    """Job: run ``history`` beside the oracle, from ``resume`` (None: from the beginning) to ``stop_after`` events."""
    placements = Placements(setting.placement, world_size, history.seed)
    oracle = Oracle(
        history, placements, foreach=setting.form == "foreach", dyadic=setting.stage == 2, widened=setting.masters
    )
    begin = resume.num_events if resume else 0
    for event in history.events[:begin]:
        oracle.apply(event)
    subject = Subject(rank, world_size, history, setting, oracle, resume)
    subject.compare_params("at the start")
    end = len(history.events) if stop_after is None else stop_after
    for number, event in enumerate(history.events[begin:end], begin):
        oracle.apply(event)
        subject.apply(event)
        subject.compare_params(f"after event {number}, {event}")
    return Saved(end, [whole(p).clone() for p in subject.params], subject.compare_state())


class Subject:
    """One rank's ``ShardedASGD``, and the oracle that it is compared with."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        history: History,
        setting: Setting,
        oracle: Oracle,
        resume: Saved | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.history = history
        self.setting = setting
        self.oracle = oracle
        self.placements = oracle.placements
        self.specs: list[GroupSpec] = list(history.groups)
        added = history.events[: resume.num_events] if resume else ()
        self.specs += [event.group for event in added if isinstance(event, AddGroup)]
        self.mesh = None if setting.mesh is None else hybrid_mesh(setting.mesh)
        self.params: list[Tensor] = []
        for spec in self.specs:
            self._make_params(spec)
        for event in history.events[: resume.num_events] if resume else ():
            if isinstance(event, SetTrained):
                self._set_trained(event)
        if resume:
            for index, saved in enumerate(resume.params):
                held(self.params[index]).copy_(self.placements.part(index, saved))
        self.optimizer = self._make_optimizer()
        if resume:
            self.optimizer.load_state_dict(resume.state)

    def apply(self, event: Event) -> None:
        """Run one event."""
        groups = self.optimizer.param_groups
        if isinstance(event, Step):
            self._step(event)
        elif isinstance(event, SetLr):
            set_lr(groups[event.group], event.lr)
        elif isinstance(event, SetT0):
            groups[event.group]["t0"] = event.t0
        elif isinstance(event, StartAveraging):
            self.optimizer.start_averaging()
        elif isinstance(event, SetTrained):
            self._set_trained(event)
        elif isinstance(event, AddGroup):
            first = len(self.params)
            self._make_params(event.group)
            group = group_dict(self.history, event.group, self.params[first:], first)
            self.specs.append(event.group)
            self.optimizer.add_param_group(group)
        else:
            self._reload(event)

    def _set_trained(self, event: SetTrained) -> None:
        self.params[event.index(self.history)].requires_grad_(event.trained)

    def compare_params(self, when: str) -> None:
        """Assert that this rank's data of every parameter has the oracle's bits, on every replica."""
        if self.setting.overlap:
            for module in self.modules:
                assert module.param is not None  # which waits for it
        for index, (found, expected) in enumerate(zip(self.params, self.oracle.params, strict=True)):
            if found.dtype != expected.dtype:
                expected = _rounded(expected.detach(), found.dtype)
            if not self.oracle.is_part(index):
                expected = self.placements.part(index, expected)
            assert_same_bits(held(found), expected, f"parameter {index} {when}")

    def compare_state(self) -> dict[str, Any]:
        """Assert that the state, consolidated and in ``optimizer.state``, has the oracle's bits. Collective."""
        found = self.optimizer.consolidated_state_dict(to=None)
        expected = self.oracle.optimizer.state_dict()
        assert found["state"].keys() == expected["state"].keys()
        for index, state in expected["state"].items():
            if self.params[index].dtype != self.oracle.params[index].dtype:
                state = {**state, "master": self.oracle.params[index].detach()}
            assert found["state"][index].keys() == state.keys()
            for key, value in state.items():
                mine = found["state"][index][key]
                if key == "ax" and self.oracle.is_part(index):
                    mine = self.placements.part(index, mine)
                assert_same_bits(mine, value, f"{key} of parameter {index}")
            self._compare_shown(index, found["state"][index]["ax"])
        for mine, theirs in zip(found["param_groups"], expected["param_groups"], strict=True):
            for key, value in theirs.items():
                assert same_tree(mine[key], value), f"group entry {key}: {mine[key]}, expected {value}"
        return found

    def _compare_shown(self, index: int, average: Tensor) -> None:
        """Assert that ``ax`` of a DTensor is a DTensor with the same placement. Collective."""
        param = self.params[index]
        if isinstance(param, DTensor):
            shown = self.optimizer.state[param]["ax"]
            assert (shown.placements, shown.device_mesh) == (param.placements, param.device_mesh)
            assert_same_bits(shown.full_tensor(), average, f"shown ax of parameter {index}")

    def _make_params(self, spec: GroupSpec) -> None:
        """Make the parameters of one more group, with their placements."""
        first = len(self.params)
        made = make_params(spec, self.history.seed, first)
        self.params += [self.placements.place(index, param) for index, param in enumerate(made, first)]

    def _make_optimizer(self) -> ShardedASGD:
        groups, index = [], 0
        for spec in self.specs:
            params = self.params[index : index + len(spec.params)]
            groups.append(group_dict(self.history, spec, params, index))
            index += len(params)
        setting = self.setting
        added = [event.group for event in self.history.events if isinstance(event, AddGroup)]
        narrow = {s.dtype for g in (*self.history.groups, *added) for s in g.params} & {"bfloat16", "float16"}
        # The dtype of torch's average, so that its bits come back; beside masters the average is float32.
        average_dtype = DTYPES[narrow.pop()] if narrow and not setting.masters else None
        optimizer = ShardedASGD(
            groups,
            mesh=self.mesh,
            average_dtype=average_dtype,
            master_weights=setting.masters,
            **setting.forms,
            stage=setting.stage,
            bucket_cap_mb=setting.bucket_cap_mb,
            shard_replicated=setting.shard_replicated,
            # In memory that ranks share nothing overlaps.
            shared_memory=not setting.overlap,
            step_in_backward=setting.in_backward,
        )
        if setting.overlap:
            # Parameters of groups that are added later have no module, unless a reload comes after.
            self.modules = nn.ModuleList([_Leaf(param) for param in self.params])
            optimizer.overlap_forward(self.modules)
        return optimizer

    def _reload(self, event: Reload) -> None:
        # Fragments fit the same buckets only, and those of a new optimizer follow what is trained now.
        toggled = any(isinstance(other, SetTrained) for other in self.history.events)
        if event.kind in ("by name", "full") and not toggled:
            self._reload_by_name(event.kind == "full")
            return
        if event.kind == "own" and not toggled:
            saved = self.optimizer.state_dict()
        elif event.kind != "torch" or self.setting.masters:  # torch's dict has no masters
            saved = self.optimizer.consolidated_state_dict(to=None)
        else:
            saved = self._state_of_torch()
        self.params = [like(p) for p in self.params]
        self.optimizer = self._make_optimizer()
        self.optimizer.load_state_dict(saved)

    def _reload_by_name(self, full: bool) -> None:
        """Reload by torch's helpers, in their full form if ``full`` and if they support it. Collective."""
        options = StateDictOptions(full_state_dict=full and self.mesh is None and loads_in_full(self.params))
        saved = get_optimizer_state_dict(self._module(), self.optimizer, options=options)
        self.params = [like(p) for p in self.params]
        self.optimizer = self._make_optimizer()
        set_optimizer_state_dict(self._module(), self.optimizer, saved, options=options)

    def _module(self) -> nn.Module:
        """A module that has the parameters, for helpers that ask a module for names."""
        return nn.ParameterList(self.params)

    def _state_of_torch(self) -> dict[str, Any]:
        """The oracle's state dict, with DTensors in place of the local tensors that the oracle has."""
        saved = copy.deepcopy(self.oracle.optimizer.state_dict())
        for index, state in saved["state"].items():
            if self.oracle.is_part(index):
                state["ax"] = placed_like(self.params[index], state["ax"])
        return saved

    def _step(self, event: Step) -> None:
        self.optimizer.zero_grad()
        dyadic = self.setting.stage == 2
        for index, param in enumerate(self.params):
            arrives = param.requires_grad and event.who[index % len(event.who)] != "none"
            if arrives and (self.setting.stage == 1 or isinstance(param, DTensor)):
                param.grad = self.placements.place(index, self._mean(index, dyadic=dyadic)).detach()
        if self.setting.stage == 2:
            self._backwards(event)
        self.optimizer.step()

    def _backwards(self, event: Step) -> None:
        """Give the parameters this rank's shares, by one or more backward passes or by hand."""
        by_backward, by_hand = self._my_shares(event)
        parts: list[dict[int, Tensor]] = [{} for _ in range(event.num_backwards)]
        generator = torch.Generator().manual_seed(self.history.seed + self.oracle.num_steps + self.rank)
        for index, share in by_backward.items():
            rest = share
            for part_of in parts[1:]:
                part_of[index] = exact_share(share, self.world_size, generator)
                rest = rest - part_of[index]
            parts[0][index] = rest
        for number, part_of in enumerate(parts):
            is_last = number == event.num_backwards - 1
            silent = (event.no_sync or self.setting.in_backward) and not is_last
            with self.optimizer.no_sync() if silent else contextlib.nullcontext():
                params = list(self.params)
                if self.setting.overlap:
                    params[: len(self.modules)] = [module() for module in self.modules]
                backward(params, part_of)
        for index, share in by_hand.items():
            self.params[index].grad = share

    def _my_shares(self, event: Step) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        by_backward: dict[int, Tensor] = {}
        by_hand: dict[int, Tensor] = {}
        step = self.oracle.num_steps
        for index, param in enumerate(self.params):
            who = event.who[index % len(event.who)]
            ranks = ranks_of(who, self.world_size, self.history.seed, step, index)
            if self.rank in ranks and param.requires_grad and not isinstance(param, DTensor):
                mean = self._mean(index, dyadic=True)
                share = shares(mean, ranks, self.world_size, self.history.seed + step + index)[self.rank]
                hand = event.by_hand[index % len(event.by_hand)]
                (by_hand if hand else by_backward)[index] = share
        return by_backward, by_hand

    def _mean(self, index: int, *, dyadic: bool) -> Tensor:
        param = self.params[index]
        return mean_gradient(param, self.history.seed, self.oracle.num_steps, index, dyadic=dyadic)


class _Leaf(nn.Module):
    """A module of one parameter, which its forward returns."""

    def __init__(self, param: Tensor) -> None:
        super().__init__()
        self.param = param

    def forward(self) -> Tensor:
        """The parameter."""
        return self.param


def _rounded(master: Tensor, dtype: torch.dtype) -> Tensor:
    """A 16-bit parameter from its float32 master."""
    if dtype == torch.float16:
        return master.half()
    bits = master.contiguous().view(torch.int32) + 0x8000 >> 16  # nearest, ties away from zero
    return bits.to(torch.int16).view(torch.bfloat16)


def backward(params: list[Tensor], gradients: dict[int, Tensor]) -> None:
    """Run one backward pass that gives each parameter exactly its gradient; none if there are no gradients."""
    products = [params[index] * gradient.conj() for index, gradient in gradients.items()]
    terms = [torch.real(product).sum().double() for product in products]
    if terms:
        torch.stack(terms).sum().backward()
