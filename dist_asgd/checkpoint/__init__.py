"""Checkpoints of a model and its optimizer: save, load, manage and export, on all ranks. Above the optimizer."""
