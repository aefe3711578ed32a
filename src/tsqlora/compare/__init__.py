"""Methods side by side at equal cost: cells that are run once each, and what they say together."""
