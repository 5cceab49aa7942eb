"""Hugging Face checkpoints as pure functions, and back: families, weights, mesh."""
