"""Images: from the argument DATA to batches of decoded images."""
