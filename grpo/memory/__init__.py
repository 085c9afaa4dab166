"""Estimates a run's memory, limits how much is computed at once, and returns freed memory."""
