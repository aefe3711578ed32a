"""What one backward pass knows of each sample."""
