"""The command line: one file per command, a dataclass of its options whose `run` does it and returns the exit code."""
