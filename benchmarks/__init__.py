"""Benchmarks of ``dist_asgd`` against the optimizers that it replaces. ``benchmarks/README.md`` has the method."""
