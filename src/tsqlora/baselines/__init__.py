"""Other methods, each built by one function for a stock Trainer: what `compare` compares with."""

from tsqlora.baselines.methods import BASELINES
from tsqlora.baselines.setup import Built, Setup

__all__ = ["BASELINES", "Built", "Setup"]
