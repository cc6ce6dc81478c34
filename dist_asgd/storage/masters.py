"""Float32 masters of 16-bit parameters: the values that are updated, of which the parameters are roundings.

held  what is kept beside a parameter. bfloat16: an int16 *remainder*, ``master bits = (parameter bits << 16) + held``,
      so that a master costs two bytes. The parameter is the master rounded to nearest, ties away from zero: with ties
      to even 65,537 masters would share a parameter, one more than 16 bits can tell apart. float16: the float32
      master itself.

In torch operators, which are also the compiled kernels' oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAN_BITS = 0x7FC00000


def held_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """The dtype of what is kept beside parameters of this 16-bit dtype."""
    return torch.int16 if param_dtype == torch.bfloat16 else torch.float32


def read(param: Tensor, held: Tensor, out: Tensor) -> Tensor:
    """The float32 masters ``(n,)`` of ``param`` and ``held``, into ``out``.

    A parameter that somebody has set is its own master for float16, and one within half a unit in the last place for
    bfloat16, whose remainder stays.
    """
    if param.dtype == torch.bfloat16:
        bits = out.view(torch.int32)
        bits.copy_(param.view(torch.int16)).mul_(1 << 16).add_(held)
        return out
    return torch.where(held.half() == param, held, param.float(), out=out)


def write(master: Tensor, param: Tensor, held: Tensor) -> None:
    """Set ``param`` to float32 ``master``, rounded, and ``held`` to what ``read`` needs to give every bit back.

    NaNs of bfloat16 parameters lose their payload.
    """
    if param.dtype == torch.bfloat16:
        bits = torch.where(master.isnan(), NAN_BITS, master.view(torch.int32))
        rounded = bits + 0x8000 >> 16
        param.view(torch.int16).copy_(rounded)
        held.copy_(bits - (rounded << 16))
    else:
        held.copy_(master)
        param.copy_(master)
