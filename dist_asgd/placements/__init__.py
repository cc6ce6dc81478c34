"""Parameters that are sharded by somebody else (DTensor, FSDP1), replica groups, and fragments shown as tensors."""
