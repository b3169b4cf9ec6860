"""Features, probes and scores."""
