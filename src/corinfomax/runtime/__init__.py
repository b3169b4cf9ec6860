"""Run folders, processes and random numbers."""
