"""PEFT's LoRA layers with a rank that can change."""
