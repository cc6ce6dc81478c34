"""The state of one optimizer as dicts in torch's layout: one rank's part, the whole, and loading either."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from ..comm import Communicators
from ..comm.agreement import NO_FINGERPRINT, Fingerprint
from ..gather import Gatherer
from ..state import ParamShards
from ..validation import check_hyperparameters, named_params
from . import full, load, sharded, unsharded
from .packing import after_load, after_state_dict, before_load, before_state_dict, pack_groups


class StateDicts:
    """Hands out and takes the state of ``optimizer``; ``shards`` is None where nothing is sharded (differentiable)."""

    def __init__(
        self, optimizer: Optimizer, shards: ParamShards | None, communicators: Communicators, gatherer: Gatherer
    ) -> None:
        self._optimizer = optimizer
        self._shards = shards
        self._communicators = communicators
        self._gatherer = gatherer
        self._known: sharded.ShardTensorCache = {}

    def part(self) -> dict[str, Any]:
        """This rank's part; no communication."""
        optimizer = self._optimizer
        before_state_dict(optimizer)
        if self._shards is None:
            packed = unsharded.pack(optimizer.param_groups, optimizer.state)
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
        state = full.collect_state(self._shards, self._communicators, to)
        if not here:
            return {}
        packed = {"state": state, "param_groups": pack_groups(self._optimizer.param_groups)}
        return after_state_dict(self._optimizer, packed)

    def read(self, state_dict: dict[str, Any]) -> tuple[load.ParsedStateDict | None, Fingerprint, Exception | None]:
        """Parse and check all of ``state_dict``, changing nothing: what to apply, and to agree on before that."""
        groups = self._optimizer.param_groups
        try:
            places = self._places()
            state_dict = before_load(self._optimizer, state_dict)
            loaded = load.parse(state_dict, groups, places, self._optimizer.defaults)
            for index, group in enumerate(loaded.groups):
                check_hyperparameters(group, f"param_groups[{index}] of the loaded state dict")
            return loaded, load.fingerprint(loaded, places), None
        except Exception as error:
            return None, NO_FINGERPRINT, error

    def _places(self) -> list[load.ParamTarget]:
        if self._shards is not None:
            return [load.ParamTarget.of(member) for member in self._shards.members]
        groups = self._optimizer.param_groups
        named = [pair for index in range(len(groups)) for pair in named_params(groups, index)]
        return [load.ParamTarget.of_whole(name, param) for name, param in named]

    @torch.no_grad()
    def apply(self, loaded: load.ParsedStateDict) -> None:
        """Collective: take over what all ranks have read."""
        groups = self._optimizer.param_groups
        # Averages may move to wider storage.
        self._known.clear()
        for group, values in zip(groups, loaded.groups, strict=True):
            params = group["params"]
            group.clear()
            group.update(values, params=params)
        if self._shards is None:
            unsharded.apply(loaded, groups, self._optimizer.state)
        else:
            for store in load.load_shards(loaded, self._shards.state_buffers):
                self._gatherer.launch(store)
                store.on_params_written()
            self._gatherer.wait()
            self._shards.replace_cohorts(load.make_cohorts(loaded, self._shards.members, groups))
        after_load(self._optimizer)
