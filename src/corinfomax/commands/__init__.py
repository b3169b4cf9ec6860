"""What each command does, in order: one room a command, and what they share."""
