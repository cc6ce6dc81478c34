"""The work of the command line on checkpoints (inspect, verify, diff, convert), in one process without ranks."""
