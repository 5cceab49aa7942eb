"""What is timed, on which model, and how."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from simgrad.bridge import Policy, load
from simgrad.models import Apply, ModelConfig, create
from simgrad.pairs import Batch, Pair
from simgrad.store import provenance
from simgrad.theory.kernel.cost import KernelFlops, Shapes, kernel_flops
from simgrad.typing import Theta
from simgrad.validation import published

Reading = Callable[[Apply, Theta, Batch], Any]
"""What a model makes of a batch."""
_SIZES = "width depth heads vocab_size kv_heads mlp_width".split()
SHAPES: dict[str, dict[str, Any]] = {
    name: dict(zip(_SIZES, sizes, strict=False))
    for name, sizes in {
        "gpt2": (768, 12, 12, 50257),
        "small": (128, 4, 4, 50257),
        "llama-135m": (576, 30, 9, 49152, 3, 1536),
        "llama-360m": (960, 32, 15, 49152, 5, 2560),
        "llama-1b": (2048, 16, 32, 128256, 8, 8192),
    }.items()
}
"""Shapes of well-known models with tied embeddings: Llama where there are key heads, else GPT-2."""
_GPT2 = {"norm": "layernorm", "qkv_bias": True, "attention_output_bias": True, "mlp_bias": True}
_LLAMA = {"positions": "rope", "activation": "silu", "mlp": "gated"}


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

    Raises:
        ValueError: an unknown shape, or a number that is not positive.
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
        for name in ("pairs", "repeats", "sample", "depth"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
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
        return max(4 * sum(self.lengths[0]), *map(sum, (*self.lengths, self.token_lengths)))


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

    def flops(self, batch: Batch, ghost: bool | None = None) -> KernelFlops:
        """Operations of one pair's kernel in the layout of a batch; ``ghost`` forces a route."""
        length, rows = batch.tokens.shape[-1], batch.targets.shape[-1]
        return kernel_flops(self.shapes, length, rows, batch.is_packed, ghost)

    def pairs(self, prompt: int, response: int, count: int | None = None) -> list[Pair]:
        """Random pairs, the same for the same lengths."""
        rng = np.random.default_rng(0)
        draw = lambda n: rng.integers(0, self.policy.config.vocab_size, n).tolist()  # noqa: E731
        count = count or self.config.pairs
        return [Pair(draw(prompt), draw(response), draw(response)) for _ in range(count)]

    def compiled(self, f: Reading, batch: Batch) -> tuple[Callable[[], Any], int]:
        """The compiled call of a function on a batch, and the temporary bytes it needs."""
        apply, theta = self.policy.apply, self.policy.theta
        program = jax.jit(lambda theta: f(apply, theta, batch)).lower(theta).compile()
        memory = program.memory_analysis()
        return lambda: program(theta), 0 if memory is None else memory.temp_size_in_bytes

    def medians(self, calls: Mapping[str, tuple[Reading, Batch]]) -> dict[str, float]:
        """Median seconds of functions on batches."""
        contestants = {name: timed(self.compiled(*call)[0]) for name, call in calls.items()}
        times = race(contestants, self.config.repeats)
        return {name: float(np.median(t)) for name, t in times.items()}


def set_up(config: Config) -> Workbench:
    """The same random weights in JAX and, if torch is there, in PyTorch."""
    shape = {**SHAPES[config.shape], **({} if config.depth is None else {"depth": config.depth})}
    if torch_version() is None:
        kind: dict[str, Any] = _LLAMA if "kv_heads" in shape else _GPT2
        model_config = ModelConfig(
            max_length=config.longest, tied=True, dtype=config.dtype, **kind, **shape
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


def timed(call: Callable[[], Any]) -> Callable[[], float]:
    """The time of the second of two calls: the first pays for what the previous contestant left."""

    def seconds() -> float:
        jax.block_until_ready(call())
        begin = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - begin

    return seconds


def race(contestants: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds that all contestants say they took, in turn within each repeat."""
    times = [{name: clock() for name, clock in contestants.items()} for _ in range(repeats)]
    return {name: np.array([t[name] for t in times]) for name in contestants}


def ratio(times: np.ndarray, others: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The ratio of two contestants' times within each repeat: median, and (smallest, largest).

    >>> ratio(np.array([1.0, 4.0, 3.0]), np.array([1.0, 2.0, 1.0]))
    (2.0, (1.0, 3.0))
    """
    ratios = times / others
    return float(np.median(ratios)), (float(ratios.min()), float(ratios.max()))


def torch_version() -> str | None:
    """Installed version, or None."""
    return metadata.version("torch") if importlib.util.find_spec("torch") else None


def machine() -> dict[str, Any]:
    """Provenance of timings: versions, devices, cores."""
    return {**provenance(), "cores": os.cpu_count(), "torch": torch_version()}
