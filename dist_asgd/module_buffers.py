"""The buffers of a module (BatchNorm's statistics, for example) beside the average of its parameters.

Buffers differ between ranks unless DDP broadcasts them, so that each rank keeps its own, whole. They lie in
``average.state["buffers"]``, by name, where state dicts and checkpoints find them; a checkpoint has those of rank 0.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .update.means import take_mean
from .update.schedule import Implementation, StepHyperparameters

MODES = ("keep", "copy", "average")
KEY = "buffers"


class ModuleBuffers:
    """Takes the buffers of one module into ``state[KEY]``, and puts them in the place of the module's own.

    mode  "keep": neither; "copy": the values of the last counted update; "average": the average of the same iterates
          as that of the parameters, and for dtypes without fractions the last values
    """

    def __init__(
        self, model: nn.Module | None, mode: str, state: dict[Any, Any], plain_name: Callable[[str], str] = str
    ) -> None:
        """``plain_name`` gives a buffer the name that it has without wrappers: a checkpoint loads in other ones."""
        self._model = None if model is None else weakref.ref(model)
        self._mode = mode
        self._state = state
        self._plain_name = plain_name

    def _live(self) -> dict[str, Tensor]:
        model = None if self._model is None or self._mode == "keep" else self._model()
        if model is None:
            return {}
        return {self._plain_name(name): buffer for name, buffer in model.named_buffers() if buffer is not None}

    def update(self, hyper: StepHyperparameters, number: float) -> None:
        """Take the buffers of update ``number``, whose parameters are taken with ``hyper``. No communication."""
        rule = hyper.average.rule
        if self._mode == "keep" or rule is None or not hyper.average.counts(number, hyper.t0):
            return
        kept: dict[str, Tensor] = self._state.setdefault(KEY, {})
        n = hyper.average.num_iterates(number, hyper.t0)
        for name, live in self._live().items():
            mean = kept.get(name)
            if mean is None or mean.shape != live.shape or mean.dtype != live.dtype:
                kept[name] = live.detach().clone()
                continue
            if mean.device != live.device:
                # A checkpoint is read on the host.
                mean = kept[name] = mean.to(live.device)
            if n == 1 or self._mode == "copy" or not (live.is_floating_point() or live.is_complex()):
                mean.copy_(live)
            elif hyper.implementation is Implementation.LERP:
                mean.lerp_(live, rule.weight(n))
            else:
                take_mean(live, mean, n, rule)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block, the module has the kept buffers; afterwards its own are back. No communication."""
        kept: dict[str, Tensor] = self._state.get(KEY, {})
        live = {name: buffer for name, buffer in self._live().items() if name in kept}
        own = {name: buffer.detach().clone() for name, buffer in live.items()}
        try:
            with torch.no_grad():
                for name, buffer in live.items():
                    buffer.copy_(kept[name])
            yield
        finally:
            with torch.no_grad():
                for name, buffer in live.items():
                    buffer.copy_(own[name])


def check_buffers(mode: str, model: nn.Module | None) -> None:
    """Raise ValueError unless ``mode`` is known, and there is a module whose buffers it can take."""
    if mode not in MODES:
        raise ValueError(f"dist_asgd: buffers must be one of {', '.join(map(repr, MODES))}, got {mode!r}.")
    if mode != "keep" and model is None:
        raise ValueError(
            f"dist_asgd: buffers={mode!r} needs the module that has them: pass the model itself as named_params, or "
            f"buffers='keep'."
        )
