"""Terms of a sample's worth, their sum Q, and a sample drawn by it."""
