"""What runs in processes of its own, to check answers that can't be trusted to end or to behave.

Nothing in here imports torch, or anything else that makes a process slow to start.
"""
