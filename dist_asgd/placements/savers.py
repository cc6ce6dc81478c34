"""Who is pickling a fragment: trainers that save on one rank are refused, and other savers are told what they save.

``torch.save(optimizer.state_dict(), path)`` writes one rank's part. That is right if every rank has a file of its own,
and a loss that shows only when the file is loaded if rank 0 alone does it, as trainers do that were written for
optimizers with the whole state on every rank. A fragment cannot know what the other ranks do, but it can see who asks.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from functools import cache

# The packages of trainers whose optimizer files are written by rank 0 alone, with what makes their files whole.
_ADVICE = {
    "transformers": "add dist_asgd.integrations.transformers.ShardedASGDCallback() to the Trainer's callbacks",
    "accelerate": "call dist_asgd.integrations.accelerate.save_whole_state(accelerator, optimizer) once",
}
_OTHER_ADVICE = "call optimizer.consolidate_state_dict(to=0) on every rank before it saves"
_TRAINERS = ("accelerate", "transformers", "lightning", "pytorch_lightning", "lightning_fabric")
_SAVE = ("torch.serialization", "save")
# Those that pass a call of torch.save on.
_BETWEEN = ("torch", "pickle", "contextlib", "functools")
_LOG = logging.getLogger("dist_asgd")


def check() -> None:
    """Raise RuntimeError if a trainer is saving a fragment for all ranks; log once if another program saves one.

    Called while a fragment is pickled, on the rank that does it. No communication.
    """
    callers = _callers()
    if not any(function == _SAVE for function in callers):
        return
    module = next((name for name, _ in callers if name.partition(".")[0] not in _BETWEEN), "")
    package = module.partition(".")[0]
    if package in _TRAINERS:
        raise RuntimeError(
            f"dist_asgd: {package} would save one rank's part of the optimizer's state as if it were the whole. To "
            f"make it whole, {_ADVICE.get(package, _OTHER_ADVICE)}. dist_asgd.save_checkpoint() needs nothing else."
        )
    _tell(module)


def _callers() -> Iterator[tuple[str, str]]:
    """Yield module and name of the functions on the call stack, from the innermost on."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame.f_globals.get("__name__", ""), frame.f_code.co_name
        frame = frame.f_back


@cache
def _tell(module: str) -> None:
    _LOG.warning(
        "%s saves this rank's part of state_dict(). That is right if every rank saves its own, in a file of its own. "
        "To save the whole on rank 0, call optimizer.consolidate_state_dict(to=0) on every rank before, or use "
        "save_checkpoint(). This is said once.",
        module,
    )
