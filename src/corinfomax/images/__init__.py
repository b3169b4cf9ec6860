"""From the argument DATA to batches of decoded images."""
