"""A run, as it is kept in its folder: checkpoints, summary, locks, going on with it."""
