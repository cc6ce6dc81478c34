"""Benchmarks of ``dist_asgd`` against the optimizers it replaces. See ``benchmarks/README.md``."""
