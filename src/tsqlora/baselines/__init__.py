"""Other methods, each built by one function for a stock Trainer: what `compare` compares with."""

from tsqlora.baselines.methods import RIVALS, get_rival
from tsqlora.baselines.setup import Built, Setup

__all__ = ["RIVALS", "Built", "Setup", "get_rival"]
