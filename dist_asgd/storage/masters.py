"""Float32 masters of 16-bit parameters: the values that an update works on, and rounds to the parameters.

held  the tensor from which, together with the parameter, the master is computed; a state buffer's ``master``.
      For a bfloat16 parameter it is an int16 *remainder*: ``master bits = (parameter bits << 16) + held``, so that a
      master costs two bytes. The parameter is the master rounded to nearest, ties away from zero: with ties to even
      65,537 masters would share a parameter, one more than 16 bits can tell apart.
      For a float16 parameter it is the float32 master itself

The functions use torch operators; tests hold the compiled kernels, which do the same, to their bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAN_BITS = 0x7FC00000


def held_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """The dtype of ``held`` for parameters of this 16-bit dtype."""
    return torch.int16 if param_dtype == torch.bfloat16 else torch.float32


def read(param: Tensor, held: Tensor, out: Tensor) -> Tensor:
    """Compute the float32 masters of ``param`` and ``held``, all ``(n,)``; returns ``out``, float32, which has them.

    If the user has set a parameter since the last ``write``, its float16 master is the parameter. The remainder of a
    bfloat16 parameter stays, so that its master is within half a unit in the last place of it.
    """
    if param.dtype == torch.bfloat16:
        bits = out.view(torch.int32)
        bits.copy_(param.view(torch.int16)).mul_(1 << 16).add_(held)
        return out
    return torch.where(held.half() == param, held, param.float(), out=out)


def write(master: Tensor, param: Tensor, held: Tensor) -> None:
    """Round float32 ``master`` to ``param``, and set ``held`` so that ``read`` returns every bit of ``master``.

    All are ``(n,)``. A NaN of a bfloat16 parameter becomes the default NaN.
    """
    if param.dtype == torch.bfloat16:
        # Rounding the bits of other NaNs up could carry into the sign.
        bits = torch.where(master.isnan(), NAN_BITS, master.view(torch.int32))
        rounded = bits + 0x8000 >> 16
        param.view(torch.int16).copy_(rounded)
        held.copy_(bits - (rounded << 16))
    else:
        held.copy_(master)
        param.copy_(master)
