"""Flat storage of parameters and state on this rank: layout, buffers, memory order, masters, snapshots."""
