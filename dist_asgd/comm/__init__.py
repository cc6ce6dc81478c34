"""Communication: the only package that calls ``torch.distributed`` collectives, with one implementation per backend.

``Communicators`` picks the implementation by device, ``Axes`` says which ranks it joins, and ``agreement`` compares
what all ranks are about to do before they do it.
"""

from .agreement import public_call
from .axes import describe_mesh
from .base import Communicator, PeerError, SendList, Wait
from .communicators import Communicators
from .reports import CollectiveCall

__all__ = [
    "CollectiveCall",
    "Communicator",
    "Communicators",
    "PeerError",
    "SendList",
    "Wait",
    "describe_mesh",
    "public_call",
]
