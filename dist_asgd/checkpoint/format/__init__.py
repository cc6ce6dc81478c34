"""What a checkpoint is on disk: directory, manifest, DCP metadata, archives, and their safe readers."""
