"""What can go wrong, and the tests that show what happens."""
