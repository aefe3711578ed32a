"""A run: plain LoRA in a stock Trainer, one callback, checkpoints, and every command about runs."""
