"""Speed of scoring, side by side with the published procedure, as ratios from one run.

Every contestant is timed in turn within each repeat, so that a noisy machine disturbs all alike;
ratios are medians over repeats of the within-repeat ratio, with their range.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from simgrad import objectives
from simgrad.bridge import Policy, load
from simgrad.bridge.engine import score_batch
from simgrad.models import ModelConfig, create
from simgrad.pairs import Pair, packed, padded
from simgrad.provenance import provenance
from simgrad.theory import pair_kernel, responses
from simgrad.typing import Array, Theta
from simgrad.validation import published

__all__ = ["Config", "Measurement", "bench"]


@dataclass(frozen=True)
class Config:
    """What is timed: a GPT-2-shaped model with random weights, in float32.

    Attributes:
        shapes: (prompt tokens, response tokens) of the random pairs; 96 and 32 are about the medians of
            the HH-RLHF harmless test set.
        pairs: pairs per shape; simgrad evaluates them as one batch, the published procedure one by one.
        repeats: timings of each contestant.
        width: D.
        depth: blocks.
        heads: attention heads.
        vocab_size: V.
    """

    shapes: tuple[tuple[int, int], ...] = ((32, 32), (96, 32), (128, 64))
    pairs: int = 4
    repeats: int = 3
    width: int = 768
    depth: int = 12
    heads: int = 12
    vocab_size: int = 50257


@dataclass(frozen=True)
class Measurement:
    """One task on one shape. Times are medians in seconds per pair; ratios say how many times simgrad is faster.

    Attributes:
        task: ``scoring`` (every forward-only column) or ``gradients`` (the three gradient scalars).
        prompt: tokens.
        response: tokens.
        seconds: simgrad's time.
        published: the published procedure's time (None without torch).
        ratio: published / simgrad.
        ratio_range: smallest and largest ratio over the repeats.
        own_limit: simgrad's time over that of its own bare pass (forward, or forward + backward).
        error: largest relative difference of the scalars from the published procedure's (dot products of
            gradients in float64).
    """

    task: str
    prompt: int
    response: int
    seconds: float
    published: float | None
    ratio: float | None
    ratio_range: tuple[float, float] | None
    own_limit: float
    error: float | None


def _policy(config: Config, length: int) -> tuple[Policy, Any]:
    """The same random weights in JAX and, if torch is there, in PyTorch."""
    if importlib.util.find_spec("torch") is None:
        shape = ModelConfig(
            vocab_size=config.vocab_size,
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            max_length=length,
            norm="layernorm",
            qkv_bias=True,
            attention_output_bias=True,
            mlp_bias=True,
            tied=True,
        )
        apply, theta = create(shape)
        return Policy(apply, theta, shape), None
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    model = published.random_gpt2(config.width, config.depth, config.heads, config.vocab_size, length)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load(folder), model


def _seconds(call: Callable[[], Any]) -> float:
    """Time of the second of two calls: the first pays for whatever the previous contestant left behind."""
    jax.block_until_ready(call())
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def _race(contestants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    times = [{name: _seconds(call) for name, call in contestants.items()} for _ in range(repeats)]
    return {name: np.array([t[name] for t in times]) for name in contestants}


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.max(np.abs(ours - theirs) / np.abs(theirs)))


def bench(
    config: Config = Config(),
    report: Callable[[Measurement], None] = lambda _: None,
    tasks: Sequence[str] = ("scoring", "gradients"),
) -> dict[str, Any]:
    """Time scoring and gradient scalars on every shape; returns a record that goes into JSON."""
    policy, model = _policy(config, max(p + r for p, r in config.shapes))
    rng = np.random.default_rng(0)
    measurements = []
    for prompt, response in config.shapes:
        draw = lambda n: rng.integers(0, config.vocab_size, n).tolist()  # noqa: E731
        pairs = [Pair(draw(prompt), draw(response), draw(response)) for _ in range(config.pairs)]
        for task in tasks:
            measurement = {"scoring": _scoring, "gradients": _gradients}[task](policy, model, pairs, config.repeats)
            report(measurement)
            measurements.append(measurement)
    return {
        "config": asdict(config),
        "provenance": {**provenance(), "cores": os.cpu_count(), "torch": _version("torch")},
        "measurements": [asdict(m) for m in measurements],
    }


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _measured(
    task: str, pairs: list[Pair], times: dict[str, np.ndarray], ours: np.ndarray, theirs: np.ndarray | None
) -> Measurement:
    ratios = times["published"] / times["simgrad"] if theirs is not None else None
    return Measurement(
        task=task,
        prompt=len(pairs[0].prompt),
        response=len(pairs[0].chosen),
        seconds=float(np.median(times["simgrad"])) / len(pairs),
        published=None if ratios is None else float(np.median(times["published"])) / len(pairs),
        ratio=None if ratios is None else float(np.median(ratios)),
        ratio_range=None if ratios is None else (float(ratios.min()), float(ratios.max())),
        own_limit=float(np.median(times["simgrad"] / times["bare"])),
        error=None if theirs is None else _difference(ours, theirs),
    )


def _scoring(policy: Policy, model: Any, pairs: list[Pair], repeats: int) -> Measurement:
    batch = packed(pairs)
    objective = objectives.get("dpo")
    bare = jax.jit(lambda theta: responses(policy.apply, theta, batch).logp)

    def ours() -> dict[str, Array]:
        return score_batch(policy.apply, policy.theta, batch, objective, 1.0, gradients=False)

    contestants: dict[str, Callable[[], Any]] = {"simgrad": ours, "bare": lambda: bare(policy.theta)}
    if model is not None:
        contestants["published"] = lambda: [published.forward_scores(model, p) for p in pairs]
    times = _race(contestants, repeats)
    got = ours()
    columns = np.stack([np.asarray(got[name]) for name in ("logp_chosen", "logp_rejected", "ches")], -1)
    theirs = None if model is None else np.array([published.forward_scores(model, p) for p in pairs])
    return _measured("scoring", pairs, times, columns, theirs)


def _gradients(policy: Policy, model: Any, pairs: list[Pair], repeats: int) -> Measurement:
    batch = padded(pairs)
    kernel = jax.jit(lambda theta: pair_kernel(policy.apply, theta, batch))

    @jax.jit
    def bare(theta: Theta) -> Theta:
        return jax.grad(lambda t: responses(policy.apply, t, batch).logp.sum())(theta)

    contestants: dict[str, Callable[[], Any]] = {
        "simgrad": lambda: kernel(policy.theta),
        "bare": lambda: bare(policy.theta),
    }
    if model is not None:
        contestants["published"] = lambda: [published.gradient_scalars(model, p) for p in pairs]
    times = _race(contestants, repeats)
    got = kernel(policy.theta)
    scalars = np.stack([np.asarray(x) for x in (got.sq_chosen, got.inner, got.sq_rejected)], -1)
    theirs = None if model is None else np.array([published.gradient_scalars(model, p, wide=True) for p in pairs])
    return _measured("gradients", pairs, times, scalars, theirs)


def write(record: dict[str, Any], path: Path) -> None:
    """Save a record of :func:`bench` as JSON."""
    import json

    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
