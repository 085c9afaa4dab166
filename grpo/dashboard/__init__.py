"""`grpo dashboard`: the runs, sweeps and studies of a folder, at one address of this machine."""
