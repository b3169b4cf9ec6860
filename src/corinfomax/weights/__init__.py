"""Checkpoints, loading anyone's weights, and export."""
