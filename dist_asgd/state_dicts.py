"""The state of one optimizer as dicts in torch's layout: one rank's part, the whole, and loading either."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from . import differentiable
from .agreement import NO_CLAIM, Claim
from .checkpoint import consolidated, loading, sharded
from .checkpoint.groups import pack_groups
from .checkpoint.hooks import after_load, after_state_dict, before_load, before_state_dict
from .comm import Communicators
from .gather import Gatherer
from .state import ShardedState
from .validation import check_hyperparameters, named_params


class StateDicts:
    """Hands out and takes the state of ``optimizer``; ``shards`` is None where nothing is sharded (differentiable)."""

    def __init__(
        self, optimizer: Optimizer, shards: ShardedState | None, communicators: Communicators, gatherer: Gatherer
    ) -> None:
        self._optimizer = optimizer
        self._shards = shards
        self._communicators = communicators
        self._gatherer = gatherer
        self._known: sharded.KnownParts = {}

    def part(self) -> dict[str, Any]:
        """This rank's part; no communication."""
        optimizer = self._optimizer
        before_state_dict(optimizer)
        if self._shards is None:
            packed = differentiable.pack(optimizer.param_groups, optimizer.state)
        else:
            packed = sharded.pack(optimizer.param_groups, self._shards, self._communicators, self._known)
        return after_state_dict(optimizer, packed)

    @torch.no_grad()
    def whole(self, to: int | None) -> dict[str, Any]:
        """Collective: everything on rank ``to`` (None: on all), {} elsewhere."""
        if self._shards is None:
            return self.part()
        here = to is None or to == self._communicators.rank
        if here:
            before_state_dict(self._optimizer)
        state = consolidated.collect_state(self._shards, self._communicators, to)
        if not here:
            return {}
        packed = {"state": state, "param_groups": pack_groups(self._optimizer.param_groups)}
        return after_state_dict(self._optimizer, packed)

    def read(self, state_dict: dict[str, Any]) -> tuple[loading.Loaded | None, Claim, Exception | None]:
        """Parse and check all of ``state_dict``, changing nothing: what to apply, and to agree on before that."""
        groups = self._optimizer.param_groups
        try:
            places = self._places()
            state_dict = before_load(self._optimizer, state_dict)
            loaded = loading.parse(state_dict, groups, places, self._optimizer.defaults)
            for index, group in enumerate(loaded.groups):
                check_hyperparameters(group, f"param_groups[{index}] of the loaded state dict")
            return loaded, loading.claim(loaded, places), None
        except Exception as error:
            return None, NO_CLAIM, error

    def _places(self) -> list[loading.Place]:
        if self._shards is not None:
            return [loading.Place.of(member) for member in self._shards.members]
        groups = self._optimizer.param_groups
        named = [pair for index in range(len(groups)) for pair in named_params(groups, index)]
        return [loading.Place.of_whole(name, param) for name, param in named]

    @torch.no_grad()
    def apply(self, loaded: loading.Loaded) -> None:
        """Collective: take over what all ranks have read."""
        groups = self._optimizer.param_groups
        # Averages may move to wider storage.
        self._known.clear()
        for group, values in zip(groups, loaded.groups, strict=True):
            params = group["params"]
            group.clear()
            group.update(values, params=params)
        if self._shards is None:
            differentiable.apply(loaded, groups, self._optimizer.state)
        else:
            for store in loading.load_shards(loaded, self._shards.stores):
                self._gatherer.launch(store)
                store.changed()
            self._gatherer.wait()
            self._shards.replace_cohorts(loading.make_cohorts(loaded, self._shards.members, groups))
        after_load(self._optimizer)
