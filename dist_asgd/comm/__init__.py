"""The only package that calls collectives: one strategy per kind of backend."""

from .axes import description
from .base import Communicator, Parts, PeerError, Wait
from .groups import Communicators

__all__ = ["Communicator", "Communicators", "Parts", "PeerError", "Wait", "description"]
