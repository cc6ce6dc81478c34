"""The only package that calls collectives: one strategy per kind of backend."""

from .axes import describe_mesh
from .base import Communicator, PeerError, SendList, Wait
from .communicators import Communicators

__all__ = ["Communicator", "Communicators", "PeerError", "SendList", "Wait", "describe_mesh"]
