"""`grpo report`: pages of runs and sweeps, made from the runs' folders alone."""
