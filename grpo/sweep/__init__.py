"""Sweeps: many runs of one command, each a job in a folder of its own; what survives is on disk."""
