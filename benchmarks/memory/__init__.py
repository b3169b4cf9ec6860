"""How much memory: every command on many images."""
