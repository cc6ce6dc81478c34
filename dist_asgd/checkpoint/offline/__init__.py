"""What the command line does with a checkpoint: inspect, verify, diff and convert, in one process."""
