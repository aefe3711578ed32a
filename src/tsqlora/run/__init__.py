"""The commands: from settings to adapter (train), and score, audit, evaluate, predict, export."""
