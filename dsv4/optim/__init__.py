"""The optimiser of a model: which parameters Muon updates and which AdamW, and both."""

from dsv4.optim.optimizer import Norms, Optimizer

__all__ = ["Norms", "Optimizer"]
