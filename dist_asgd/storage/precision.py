"""How an optimizer keeps and sends values: their dtypes, beside those of its parameters, and where averages lie."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtypes, besides the parameters' own, in which values are kept and sent: options of the constructor.

    ``average_device`` is where averages lie; None is the device of their parameters.
    """

    average_dtype: torch.dtype | None = None
    master_weights: bool = False
    stochastic_rounding: int | None = None
    reduce_dtype: torch.dtype | None = None
    average_device: torch.device | None = None

    def options(self) -> dict[str, str]:
        """The options by name, as plain values: ranks compare them."""
        return {key: str(value) for key, value in asdict(self).items()}
