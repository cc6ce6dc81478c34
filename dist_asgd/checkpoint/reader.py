"""The documented path of ``CheckedReader``, for ``dcp.load(state, storage_reader=CheckedReader(path))``."""

from .format.reader import CheckedReader

__all__ = ["CheckedReader"]
