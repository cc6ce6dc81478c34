"""All that this package knows of FSDP1 (``FullyShardedDataParallel``).

FSDP1 flattens the parameters of a module into one 1-D tensor and cuts it evenly over the ranks. Between steps a
parameter is therefore a 1-D fragment of any length, empty on many ranks; without ``use_orig_params`` the only parameter
of the module is this rank's shard of the flat tensor. Which elements a rank holds is known to the module only, so calls
that need it are refused here with a remedy. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def is_managed(param: Tensor) -> bool:
    """Whether FSDP1 manages ``param``, with or without ``use_orig_params``."""
    return hasattr(param, "_fsdp_flattened") or hasattr(param, "_is_flat_param")


def refusal(call: str, remedy: str) -> RuntimeError:
    """The error for a ``call`` that would have to know which elements this rank holds."""
    return RuntimeError(
        f"dist_asgd: {call} with parameters of FullyShardedDataParallel (FSDP1): how it has cut them only the module "
        f"knows. {remedy}, or use torch.distributed.fsdp.fully_shard (FSDP2)."
    )


def refuse(call: str, params: Iterable[Tensor], remedy: str) -> None:
    """Raise ``refusal(call, remedy)`` if any of ``params`` is managed by FSDP1; the same on all ranks."""
    if any(map(is_managed, params)):
        raise refusal(call, remedy)
