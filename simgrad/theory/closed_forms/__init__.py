"""Closed forms of models that can be written down: linear softmax, unconstrained features, one step on logits."""
