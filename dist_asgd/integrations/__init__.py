"""Adapters for trainers, one module for each library. A module imports its library when it is imported itself."""
