"""A sharded ``torch.optim.ASGD``: averaged SGD whose state, and on request gradients, are sharded over ranks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .amp import GradScaler
from .comm import PeerError
from .memory import MemoryReport
from .optimizer import ShardedASGD
from .version import __version__

if TYPE_CHECKING:
    from .checkpoint.export import export_averaged
    from .checkpoint.format.manifest import CheckpointError
    from .checkpoint.load import load_checkpoint, read_extra
    from .checkpoint.manager import CheckpointManager, Restored
    from .checkpoint.save import PendingSave, async_save_checkpoint, save_checkpoint

__all__ = [
    "CheckpointError",
    "CheckpointManager",
    "GradScaler",
    "MemoryReport",
    "PeerError",
    "PendingSave",
    "Restored",
    "ShardedASGD",
    "__version__",
    "async_save_checkpoint",
    "export_averaged",
    "load_checkpoint",
    "read_extra",
    "save_checkpoint",
]

# These names are loaded when first used: torch.distributed.checkpoint takes as long to import as half of torch.
# Each belongs to a module of dist_asgd.checkpoint.
_ON_DEMAND = {
    "CheckpointError": "format.manifest",
    "CheckpointManager": "manager",
    "PendingSave": "save",
    "Restored": "manager",
    "async_save_checkpoint": "save",
    "export_averaged": "export",
    "load_checkpoint": "load",
    "read_extra": "load",
    "save_checkpoint": "save",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".checkpoint.{_ON_DEMAND[name]}", __name__), name)
