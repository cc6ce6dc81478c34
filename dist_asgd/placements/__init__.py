"""Presharded parameters (DTensor, FSDP1), replica groups, and fragments that are shown as tensors."""
