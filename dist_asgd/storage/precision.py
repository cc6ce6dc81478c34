"""The dtypes in which an optimizer keeps and sends values, beside those of its parameters."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtypes, besides the parameters' own, in which values are kept and sent: options of the constructor."""

    average_dtype: torch.dtype | None = None
    master_weights: bool = False
    stochastic_rounding: int | None = None
    reduce_dtype: torch.dtype | None = None

    def options(self) -> dict[str, str]:
        """The options by name, as plain values: ranks compare them."""
        return {key: str(value) for key, value in asdict(self).items()}
