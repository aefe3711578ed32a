"""What one backward pass yields for each sample."""
