"""A frozen model over rows: load it, pass rows through it, read its head."""
