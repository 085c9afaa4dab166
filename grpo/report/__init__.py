"""`grpo report`: what a sweep says, from its jobs' folders alone."""
