"""Which bucket has each parameter's memory: a parameter that a second optimizer is given moves to that one's bucket."""

from __future__ import annotations

import weakref
from typing import ClassVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Owners:
    """The bucket that each parameter was last moved to, and its name there, over all optimizers of the process."""

    # It keeps neither parameters nor buckets alive.
    _by_param: ClassVar[WeakIdKeyDictionary] = WeakIdKeyDictionary()

    @classmethod
    def claim(cls, param: Tensor, bucket: object, name: str) -> None:
        """Note that ``bucket`` has the memory of ``param`` from now on. Every bucket claims its parameters."""
        cls._by_param[param] = (weakref.ref(bucket), name)

    @classmethod
    def other(cls, param: Tensor, bucket: object) -> str | None:
        """The name of ``param`` in another bucket that has it and is still in use; None if there is none."""
        if param not in cls._by_param:
            return None
        owner, name = cls._by_param[param]
        return None if owner() in (None, bucket) else str(name)
