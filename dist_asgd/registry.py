"""The parameters that an optimizer was built for, beside those that ``param_groups`` and the process group hold now.

``ShardedASGD`` asks its ``ParamRegistry`` first in every call that uses the parameters.
"""

from __future__ import annotations

import torch.distributed as dist

from .comm import Communicators
from .state import ParamShards


class ParamRegistry:
    """Notices that the optimizer is used in other circumstances than it was built in."""

    def __init__(self, shards: ParamShards, communicators: Communicators) -> None:
        self._shards = shards
        self._communicators = communicators

    def check_group(self) -> None:
        """Raise RuntimeError if a default process group was made after this optimizer, which does not know of it.

        Called before the first step. Every rank finds it by itself, so nothing is sent.
        """
        if self._communicators.predates_group:
            raise RuntimeError(
                f"dist_asgd: the optimizer was constructed before init_process_group(), for one process, and now there "
                f"is a default group of {dist.get_world_size()} ranks: they would drift apart. Call "
                f"init_process_group() first and construct the optimizer afterwards, or pass process_group (a group of "
                f"this rank alone if each rank is to train by itself)."
            )
