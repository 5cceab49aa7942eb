"""What is timed, on which model, and how."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from simgrad.bridge import Policy, load
from simgrad.models import ModelConfig, create
from simgrad.pairs import Pair
from simgrad.theory.kernel.cost import Shapes
from simgrad.validation import published

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"width": 768, "depth": 12, "heads": 12, "vocab_size": 50257},
    "small": {"width": 128, "depth": 4, "heads": 4, "vocab_size": 50257},
    "llama-135m": {
        "width": 576,
        "depth": 30,
        "heads": 9,
        "kv_heads": 3,
        "mlp_width": 1536,
        "vocab_size": 49152,
        "mlp": "gated",
    },
    "llama-360m": {
        "width": 960,
        "depth": 32,
        "heads": 15,
        "kv_heads": 5,
        "mlp_width": 2560,
        "vocab_size": 49152,
        "mlp": "gated",
    },
    "llama-1b": {
        "width": 2048,
        "depth": 16,
        "heads": 32,
        "kv_heads": 8,
        "mlp_width": 8192,
        "vocab_size": 128256,
        "mlp": "gated",
    },
}
"""Shapes of well-known models with tied embeddings; a gated MLP means Llama, else GPT-2."""


@dataclass(frozen=True)
class Config:
    """What is timed: a model with random weights on random pairs.

    Attributes:
        lengths: (prompt tokens, response tokens) of the pairs; 96 and 32 are about the medians of
            the HH-RLHF harmless test set.
        token_lengths: the same for token kernels.
        pairs: pairs of each length; simgrad evaluates them as one batch, the published procedure
            one by one.
        repeats: timings of each contestant.
        shape: one of :data:`SHAPES`.
        depth: blocks (None: those of the shape).
        dtype: of weights and activations.
        sample: tokens whose gradients the published token kernel takes; its time is scaled to all
            of them.
    """

    lengths: tuple[tuple[int, int], ...] = ((96, 32), (32, 32), (128, 64))
    token_lengths: tuple[int, int] = (32, 24)
    pairs: int = 4
    repeats: int = 3
    shape: str = "gpt2"
    depth: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    sample: int = 4

    def __post_init__(self) -> None:
        """Refuse what cannot be timed, before anything is."""
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r}: choose from {', '.join(SHAPES)}")
        for name in ("pairs", "repeats", "sample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}")
        if not self.lengths:
            raise ValueError("lengths: give at least one pair of prompt and response tokens")
        for prompt, response in (*self.lengths, self.token_lengths):
            if min(prompt, response) < 1:
                raise ValueError(
                    f"prompts and responses have at least one token, got {prompt} and {response}"
                )

    @property
    def longest(self) -> int:
        """Positions that the model must have; growth takes up to four times the first length."""
        return max(
            4 * sum(self.lengths[0]), *(p + r for p, r in (*self.lengths, self.token_lengths))
        )


@dataclass(frozen=True)
class Workbench:
    """Everything a task needs.

    Attributes:
        config: what is timed.
        policy: simgrad's model.
        model: the same weights in PyTorch, or None without torch.
        product: a large matrix product, the ceiling that is timed beside every task.
        product_flops: its floating-point operations.
    """

    config: Config
    policy: Policy
    model: Any
    product: Callable[[], Any]
    product_flops: float

    @property
    def shapes(self) -> Shapes:
        """Of the policy's maps."""
        return Shapes.of(self.policy.apply, self.policy.theta)

    def pairs(self, prompt: int, response: int, count: int | None = None) -> list[Pair]:
        """Random pairs, the same for the same lengths."""
        rng = np.random.default_rng(0)
        draw = lambda n: rng.integers(0, self.policy.config.vocab_size, n).tolist()  # noqa: E731
        return [
            Pair(draw(prompt), draw(response), draw(response))
            for _ in range(count or self.config.pairs)
        ]


def set_up(config: Config) -> Workbench:
    """The same random weights in JAX and, if torch is there, in PyTorch."""
    shape = {**SHAPES[config.shape], **({} if config.depth is None else {"depth": config.depth})}
    if importlib.util.find_spec("torch") is None:
        llama = {"positions": "rope", "activation": "silu"}
        gpt2 = {
            "norm": "layernorm",
            "qkv_bias": True,
            "attention_output_bias": True,
            "mlp_bias": True,
        }
        more = llama if "mlp" in shape else gpt2
        model_config = ModelConfig(
            max_length=config.longest, tied=True, dtype=config.dtype, **more, **shape
        )
        policy, model = Policy(*create(model_config), model_config), None
    else:
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        model = published.random_model(shape, config.longest)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            policy = load(folder, config.dtype)
        device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
        model = model.to(device, getattr(torch, config.dtype))
    size = 2048 if jax.default_backend() == "cpu" else 8192
    square, product = jnp.ones((size, size), config.dtype), jax.jit(jnp.matmul)
    return Workbench(config, policy, model, lambda: product(square, square), 2.0 * size**3)


def seconds(call: Callable[[], Any]) -> float:
    """Time of the second of two calls: the first pays for what the previous contestant left."""
    jax.block_until_ready(call())
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def race(contestants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    """Times of all contestants, in turn within each repeat."""
    times = [{name: seconds(call) for name, call in contestants.items()} for _ in range(repeats)]
    return {name: np.array([t[name] for t in times]) for name in contestants}


def version(package: str) -> str | None:
    """Installed version, or None."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
