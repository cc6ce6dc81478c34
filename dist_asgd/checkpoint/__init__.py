"""Checkpoints of a model and its optimizer: saving, loading, managing and exporting them from all ranks.

This room lies above the optimizer. ``format`` is what is on disk, ``offline`` the work of the command line.
"""
