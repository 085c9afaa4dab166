"""`grpo dashboard`: the runs, sweeps and studies of a folder, on one address of this machine."""
