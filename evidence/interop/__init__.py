"""What becomes of a reset on its way to real programs, and who notices an end."""
