"""A sharded ``torch.optim.ASGD``: averaged SGD whose state, and on request gradients, are sharded over ranks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .amp import GradScaler
from .batch_statistics import update_batch_norm
from .comm import PeerError
from .memory import MemoryReport
from .optimizer import ShardedASGD
from .sharded_average import ShardedAverage
from .stats import Stats
from .trigger import NonMonotonicTrigger
from .update.weights import AverageRule, ExponentialMean, HalfLife, PowerMean, UniformMean
from .version import __version__

if TYPE_CHECKING:
    from .checkpoint.export import export_averaged
    from .checkpoint.format.manifest import CheckpointError
    from .checkpoint.load import load_checkpoint, read_extra
    from .checkpoint.manager import CheckpointManager, Restored
    from .checkpoint.offline.merge import average_between, average_checkpoints
    from .checkpoint.pending import PendingSave
    from .checkpoint.save import async_save_checkpoint, save_checkpoint
    from .planning.planner import Plan, plan

__all__ = [
    "AverageRule",
    "CheckpointError",
    "CheckpointManager",
    "ExponentialMean",
    "GradScaler",
    "HalfLife",
    "MemoryReport",
    "NonMonotonicTrigger",
    "PeerError",
    "PendingSave",
    "Plan",
    "PowerMean",
    "Restored",
    "ShardedASGD",
    "ShardedAverage",
    "Stats",
    "UniformMean",
    "__version__",
    "async_save_checkpoint",
    "average_between",
    "average_checkpoints",
    "export_averaged",
    "load_checkpoint",
    "plan",
    "read_extra",
    "save_checkpoint",
    "update_batch_norm",
]

# These names are loaded when first used, each from its module: torch.distributed.checkpoint takes as long to import as
# half of torch.
_ON_DEMAND = {
    "CheckpointError": "checkpoint.format.manifest",
    "CheckpointManager": "checkpoint.manager",
    "PendingSave": "checkpoint.pending",
    "Plan": "planning.planner",
    "Restored": "checkpoint.manager",
    "async_save_checkpoint": "checkpoint.save",
    "average_between": "checkpoint.offline.merge",
    "average_checkpoints": "checkpoint.offline.merge",
    "export_averaged": "checkpoint.export",
    "load_checkpoint": "checkpoint.load",
    "plan": "planning.planner",
    "read_extra": "checkpoint.load",
    "save_checkpoint": "checkpoint.save",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ON_DEMAND[name]}", __name__), name)
