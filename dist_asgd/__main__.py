"""``python -m dist_asgd``: the command line."""

from .cli import run

run()
