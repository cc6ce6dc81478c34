"""All that this package knows of FSDP1 (``FullyShardedDataParallel``).

FSDP1 flattens the parameters of a module into one 1-D tensor and cuts it evenly over the ranks. Between steps a
parameter is therefore a 1-D fragment of any length, empty on many ranks; without ``use_orig_params`` the only parameter
of the module is this rank's shard of the flat tensor. Which elements a rank holds is known to the module only, so calls
that need it are refused here with a remedy. Nothing here communicates.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from types import FrameType

from torch import Tensor

# What to do instead of a call that is refused.
CALL_FSDP1 = "Call FSDP.optim_state_dict(model, optimizer) on all ranks"
LOAD_BY_FSDP1 = "Load FSDP.optim_state_dict_to_load(model, optimizer, state_dict) in place of a full state dict"
USE_DCP = "Save and load get_state_dict(model, optimizer) with torch.distributed.checkpoint"
_AVERAGES = (
    "ax of FSDP.optim_state_dict(model, optimizer)['state'] by parameter name, where step is above 0 (elsewhere the "
    "parameter itself)"
)
LOAD_AVERAGES = f"Load {_AVERAGES}, into a model without FSDP"
SAVE_AVERAGES = f"Save {_AVERAGES}"


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


# The functions of torch that ask an optimizer for its state dict, or are given it, to make a full or sharded one.
_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel"
_COLLECTORS = {(_FSDP1, f"{kind}optim_state_dict") for kind in ("", "full_", "sharded_")}
_DCP_COLLECTOR = ("torch.distributed.checkpoint.state_dict", "_get_optim_state_dict")
_CONVERTER = ("torch.distributed.fsdp._optim_utils", "_optim_state_dict")


def _callers() -> Iterator[tuple[tuple[str, str], FrameType]]:
    """Yield the functions on the call stack, from the innermost on: (module, name), and the frame."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        yield (frame.f_globals.get("__name__", ""), frame.f_code.co_name), frame
        frame = frame.f_back


def is_collecting_state() -> bool:
    """Whether a helper of torch is waiting for a state dict now to treat it as that of a model with FSDP1 modules.

    The optimizer of such a model need not have a parameter that FSDP1 manages (a frozen backbone under FSDP1, and a
    head that is trained), so only the caller can tell. All ranks are in that call, as it is collective.
    """
    for function, frame in _callers():
        if function in _COLLECTORS:
            return True
        if function == _DCP_COLLECTOR:
            return bool(getattr(frame.f_locals.get("info"), "fsdp_modules", None))
    return False


def is_making_full_state() -> bool:
    """Whether FSDP1 is making a full state dict now of one that it has got already."""
    return any(function == _CONVERTER and not frame.f_locals.get("shard_state") for function, frame in _callers())
