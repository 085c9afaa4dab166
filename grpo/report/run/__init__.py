"""A run's page, and that of several runs laid over each other."""
