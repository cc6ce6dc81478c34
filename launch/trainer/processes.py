"""The processes of a run: they start, exchange small values, fail and end together.

Small values are exchanged over a Gloo group of their own, on the CPU, where they never wait for a GPU's stream.
"""

import gc
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


class TrainingError(Exception):
    """A failure that every rank raises together, with a message for the user."""


class Processes:
    """This process and its group. Without torchrun it is the only process, and there is no process group."""

    def __init__(self, timeout: timedelta) -> None:
        self.timeout = timeout
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.is_distributed = "RANK" in os.environ
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        self._control: dist.ProcessGroup | None = None
        if self.is_distributed:
            on_gpu = self.device.type == "cuda"
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", timeout=timeout, device_id=self.device if on_gpu else None
            )
            self._control = dist.new_group(backend="gloo", timeout=timeout)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the run's files and prints for the user."""
        return self.rank == 0

    def close(self) -> None:
        """Wait for all ranks, since one that leaves early can abort its peers, and leave the groups. Collective."""
        if self.is_distributed:
            dist.barrier(group=self._control)
            groups = [dist.group.WORLD, self._control]
            dist.destroy_process_group()
            # A thread of Gloo that still lets go of a tensor when Python ends aborts the process. Freed here, the
            # groups wait for their threads; freed inside the call above, they would hold the lock that those need.
            self._control = None
            groups.clear()
            gc.collect()

    def synchronize(self) -> None:
        """Wait until the device is idle, so that a clock can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def total(self, *values: float) -> list[float]:
        """The sum of each value over all ranks. Collective."""
        if not self.is_distributed:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self._control)
        return sums.tolist()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank. Collective."""
        if not self.is_distributed:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank and return its result; if one fails, all raise TrainingError. Collective."""
        result, failure = _attempt(action)
        failures: dict[str, list[int]] = {}
        for rank, text in enumerate(self.gather(failure)):
            if text is not None:
                failures.setdefault(text, []).append(rank)
        if failures:
            raise TrainingError("; ".join(f"{text} (rank {_listed(on)})" for text, on in failures.items()))
        return result  # type: ignore[return-value]  # no failure: there is a result

    def on_first(self, action: Callable[[], T]) -> T | None:
        """Run `action` on rank 0 only; if it fails, all ranks raise TrainingError. Other ranks get None. Collective."""
        return self.together(lambda: action() if self.is_first else None)

    def broadcast_parameters(self, module: nn.Module) -> None:
        """Copy rank 0's parameters to every rank. Collective."""
        if self.is_distributed:
            for parameter in module.parameters():
                dist.broadcast(parameter.detach(), src=0)


def _attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result of `action`, and its failure as text if it failed in one of the usual ways."""
    try:
        return action(), None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as failure:
        return None, f"{type(failure).__name__}: {failure}"


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
