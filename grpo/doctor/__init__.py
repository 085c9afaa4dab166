"""The doctor: what is wrong with a run, told by its metrics, live and in its report."""
