"""A run's folder: files, checkpoints, summary, locks, resuming and stopping."""
