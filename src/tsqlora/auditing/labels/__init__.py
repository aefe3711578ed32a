"""The judge of labels, and what it finds."""
