"""Where the Triton kernel finds this step's gradients: their addresses on the device, also inside of CUDA graphs.

column  int64 ``(num_segments,)`` on the device: the address of each segment's gradient
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The widest access of the kernel: it needs gradients at multiples of this.
ACCESS_BYTES = 16


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy ``values`` from the host to ``device``; nobody waits for an accelerator, unlike in ``values.to(device)``.

    On the host ``values`` themselves are returned.
    """
    if device.type == "cpu":
        return values
    # The caching allocator keeps the pinned memory until the copy is over.
    return values.pin_memory().to(device, non_blocking=True)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class AddressColumn:
    """The gradients' addresses on the device, uploaded when they change, without waiting for the device.

    A CUDA graph reads the addresses from the memory that it was captured with, so memory that a capture has used is
    kept as long as the launch and never written by anything but the graph.

    ``chosen`` are the indices, among ``num_segments`` addresses, of the segments that are not empty.
    """

    def __init__(self, chosen: Sequence[int], num_segments: int, device: torch.device) -> None:
        self._chosen, self._num_segments = chosen, num_segments
        self._device, self._pinned = device, device.type == "cuda"
        self._latest: tuple[list[int], tuple[Tensor, bool]] | None = None
        # (addresses, pinned memory, column) of every capture; no pinned memory if the column was uploaded before it.
        self._captured: list[tuple[list[int], Tensor | None, Tensor]] = []
        self._spare: tuple[Tensor, Tensor] | None = self._make_spare()

    def _make_spare(self) -> tuple[Tensor, Tensor]:
        # Made outside of captures, during which no pinned memory can be allocated.
        staging = torch.zeros(len(self._chosen), dtype=torch.int64, device="cpu", pin_memory=self._pinned)
        return staging, torch.zeros_like(staging, device=self._device)

    def of(self, addresses: list[int]) -> tuple[Tensor, bool]:
        """The column ``(num_chosen,)`` of these addresses, and whether all are multiples of ``ACCESS_BYTES``.

        ValueError unless there are ``num_segments`` addresses; RuntimeError as in ``_captured_column``.
        """
        capturing = _is_capturing(self._device)
        if not capturing and self._spare is None:
            self._spare = self._make_spare()
        if self._latest is not None and self._latest[0] == addresses:
            if capturing:
                self._captured.append((addresses, None, self._latest[1][0]))
            return self._latest[1]
        if len(addresses) != self._num_segments:
            raise ValueError(f"{len(addresses)} gradients for {self._num_segments} segments")
        rows = [addresses[i] for i in self._chosen]
        aligned = not any(address % ACCESS_BYTES for address in rows)
        if capturing:
            return self._captured_column(addresses, rows), aligned
        host = torch.tensor(rows, dtype=torch.int64, device="cpu")
        self._latest = (addresses, (to_device(host, self._device), aligned))
        return self._latest[1]

    def _captured_column(self, addresses: list[int], rows: list[int]) -> Tensor:
        """The column for the graph that is being captured, which uploads it; RuntimeError if no memory is set aside."""
        for captured, staging, column in self._captured:
            if captured == addresses and staging is not None:
                # This graph uploads them too: the earlier capture may be another graph's, which may not have run.
                return column.copy_(staging, non_blocking=True)
        if self._spare is None:
            raise RuntimeError(
                "a second CUDA graph is captured with gradients at new addresses, and what was set aside for one is "
                "used up: take one step outside of graphs before each capture"
            )
        (staging, column), self._spare = self._spare, None
        self._captured.append((addresses, staging, column))
        return column.copy_(staging.copy_(torch.tensor(rows, dtype=torch.int64, device="cpu")), non_blocking=True)
