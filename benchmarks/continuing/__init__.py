"""Whether continuing from weights betters them, on several sets of images."""
