"""Tests of ``dist_asgd``."""
