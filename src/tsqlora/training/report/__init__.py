"""report.html: what a run did and why, from its directory alone. Reads files, never a model."""
