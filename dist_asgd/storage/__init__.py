"""The flat memory of parameters and state on this rank: layout, buckets, memory order, masters, snapshots."""
