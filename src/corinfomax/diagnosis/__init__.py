"""Label-free measures of a run, and the verdict in words."""
