"""The doctor finds what is wrong with a run from its metrics, live and for its report."""
