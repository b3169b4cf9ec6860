"""The commands as functions of a Python program."""
