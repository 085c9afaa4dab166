"""Checks answers that may never end or may do harm, in separate processes.

Nothing in here imports torch, or anything else that makes a process slow to start.
"""
