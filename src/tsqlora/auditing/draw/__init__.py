"""Which rows an epoch draws."""
