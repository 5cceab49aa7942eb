"""Closed forms of simple models: linear softmax, unconstrained features, one logit step."""

from simgrad.theory.closed_forms import learning_dynamics, linear_softmax, unconstrained

__all__ = ["learning_dynamics", "linear_softmax", "unconstrained"]
