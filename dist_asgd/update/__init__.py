"""The ASGD rule on local tensors; no communication in sight."""
