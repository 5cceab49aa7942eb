"""Closed forms of simple models: linear softmax, unconstrained features, one logit step."""
