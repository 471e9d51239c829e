"""What is trained, and by which loss: one interface, and an objective per file."""

from chroma_jax.training.objectives.interface import Objective, Preparation, make_objective

__all__ = ["Objective", "Preparation", "make_objective"]
