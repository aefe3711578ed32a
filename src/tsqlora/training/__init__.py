"""The method inside a stock Trainer."""
