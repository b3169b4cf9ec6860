"""Every setting of a run, and the named recipes."""
