"""The commands: from settings to adapter (train), and score, allocate, audit, evaluate, predict, export."""
