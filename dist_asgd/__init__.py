"""Sharded ``torch.optim.ASGD``: averaged SGD with its state, and its gradients, split across ranks."""

from .amp import GradScaler
from .comm import PeerError
from .memory import MemoryReport
from .optimizer import ShardedASGD
from .version import __version__

__all__ = ["GradScaler", "MemoryReport", "PeerError", "ShardedASGD", "__version__"]
