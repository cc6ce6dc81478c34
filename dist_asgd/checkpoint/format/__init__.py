"""A checkpoint on disk: its directory, files and manifest, DCP's metadata, the writer and the safe reader."""
