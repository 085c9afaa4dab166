"""Sweeps: one command runs many jobs, each in its own folder; all state is on disk."""
