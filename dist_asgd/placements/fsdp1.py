"""What is known here of FSDP1 (``FullyShardedDataParallel``), which flattens a module's parameters and cuts that.

part   what it leaves of a parameter on a rank between steps: a 1-D stretch of the flat one, of any length. Without
       ``use_orig_params`` the parameter is the flat one itself, of which each rank has an equal stretch
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def is_part(param: Tensor) -> bool:
    """Whether FSDP1 manages ``param``, with or without ``use_orig_params``."""
    return hasattr(param, "_fsdp_flattened") or hasattr(param, "_is_flat_param")


def refusal(call: str, remedy: str) -> RuntimeError:
    """The error of a call that would have to know how FSDP1 has cut its parameters."""
    return RuntimeError(
        f"dist_asgd: {call} with parameters of FullyShardedDataParallel (FSDP1): how it has cut them only the module "
        f"knows. {remedy}, or use torch.distributed.fsdp.fully_shard (FSDP2)."
    )


def refuse(call: str, params: Iterable[Tensor], remedy: str) -> None:
    """Raise that where any of ``params`` is managed by FSDP1; on all ranks alike."""
    if any(map(is_part, params)):
        raise refusal(call, remedy)
