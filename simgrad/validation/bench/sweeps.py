"""Speed of sweeps beside a plain PyTorch loop for every run, as ratios from one process.

The loop is DPO as one would write it: one forward pass over chosen and rejected together,
``log_softmax`` and ``gather``, ``loss.backward()``, ``optimizer.step()``. Both sides start from the
same parameters, take the same batches in the same order, and are compared in what the runs did to
the log-probs.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from simgrad.dynamics.configs import RunConfig, grid
from simgrad.dynamics.sweep import sweep
from simgrad.models import Apply, ModelConfig, create, linear_softmax
from simgrad.objectives import DPO
from simgrad.pairs import Pair, packed
from simgrad.store import provenance
from simgrad.typing import Theta
from simgrad.validation.bench.workbench import version

BETA = DPO().beta


@dataclass(frozen=True)
class SweepConfig:
    """What is timed: DPO by SGD, float32, random weights and pairs.

    Attributes:
        steps: of a run.
        batch_sizes: pairs a step of the transformer's tasks.
        pairs: of the transformer's tasks in all.
        learning_rate: η; the linear-softmax model takes 10 to 100 times as much.
        prompt: tokens of the transformer's prompts.
        response: tokens of its responses; the linear-softmax model's have one.
        width: D of the transformer (learned positions, RMSNorm, plain MLP, 4 heads).
        linear_width: D of the linear-softmax model.
        linear_pairs: its pairs, all of them in every step.
        depth: blocks.
        vocab_size: V.
        seeds: runs of the transformer's tasks.
        linear_seeds: policies of the linear-softmax model, each run with every learning rate.
        linear_rates: learning rates of the linear-softmax model.
        repeats: timings of each contestant.
        loops: PyTorch runs in each of its timings.
    """

    steps: int = 200
    batch_sizes: tuple[int, ...] = (2, 8)
    pairs: int = 16
    learning_rate: float = 0.01
    prompt: int = 4
    response: int = 4
    width: int = 64
    linear_width: int = 16
    linear_pairs: int = 8
    depth: int = 2
    vocab_size: int = 108
    seeds: int = 16
    linear_seeds: int = 64
    linear_rates: int = 8
    repeats: int = 5
    loops: int = 2


@dataclass(frozen=True)
class SweepMeasurement:
    """One task. Times are medians in seconds per run without compilation, ratios within a repeat.

    Attributes:
        task: the model.
        batch_size: pairs a step.
        runs: of simgrad's sweep.
        seconds: simgrad's time.
        loop: the PyTorch loop's time (None without torch).
        ratio: loop / simgrad.
        ratio_range: smallest and largest ratio over the repeats.
        compiling: seconds of the first sweep beyond a later one.
        error: largest difference of Δlog π from the loop's, relative to the largest Δlog π.
    """

    task: str
    batch_size: int
    runs: int
    seconds: float
    loop: float | None
    ratio: float | None
    ratio_range: tuple[float, float] | None
    compiling: float
    error: float | None


def bench_sweeps(
    config: SweepConfig = SweepConfig(), report: Callable[[SweepMeasurement], None] = lambda _: None
) -> dict[str, Any]:
    """Time sweeps of a transformer and of a linear-softmax model; returns a record for JSON."""
    measurements = []
    for batch_size in config.batch_sizes:
        measurements.append(_transformer(config, batch_size))
        report(measurements[-1])
    measurements.append(_linear(config))
    report(measurements[-1])
    here = {"cores": os.cpu_count(), "devices": jax.local_device_count(), "torch": version("torch")}
    return {
        "config": asdict(config),
        "provenance": {**provenance(), **here},
        "measurements": [asdict(m) for m in measurements],
    }


def _pairs(config: SweepConfig, count: int, prompt: int, response: int) -> list[Pair]:
    """Random pairs; no two prompts begin alike, no rejected token is the chosen one there."""
    random, size = np.random.default_rng(0), config.vocab_size
    prompts = random.integers(0, size, (count, prompt))
    prompts[:, 0] = np.arange(count)
    chosen = random.integers(0, size, (count, response))
    rejected = (chosen + random.integers(1, size, chosen.shape)) % size
    return [
        Pair(*sides)
        for sides in zip(prompts.tolist(), chosen.tolist(), rejected.tolist(), strict=True)
    ]


def _transformer(config: SweepConfig, batch_size: int) -> SweepMeasurement:
    pairs = _pairs(config, config.pairs, config.prompt, config.response)
    shape = ModelConfig(
        vocab_size=config.vocab_size,
        width=config.width,
        depth=config.depth,
        max_length=config.prompt + config.response,
    )
    policies = [create(shape, seed) for seed in range(config.seeds)]
    configs = grid(
        optimizer="sgd",
        learning_rate=config.learning_rate,
        steps=config.steps,
        batch_size=batch_size,
    )

    def copy() -> Any:
        from simgrad.validation.torch_loop import Transformer

        return Transformer(jax.tree.map(np.asarray, policies[0][1]), shape)

    return _race(
        f"{config.depth}-layer transformer",
        config,
        policies[0][0],
        [t for _, t in policies],
        pairs,
        configs,
        copy,
    )


def _linear(config: SweepConfig) -> SweepMeasurement:
    pairs = _pairs(config, config.linear_pairs, 1, 1)
    policies = [
        linear_softmax(pairs, config.vocab_size, config.linear_width, s)
        for s in range(config.linear_seeds)
    ]
    apply, theta = policies[0]
    rates = np.geomspace(10, 100, config.linear_rates) * config.learning_rate
    configs = grid(optimizer="sgd", learning_rate=rates, steps=config.steps)

    def copy() -> Any:
        from simgrad.validation.torch_loop import Linear

        prompts = [apply.contexts.index(tuple(p.prompt)) for p in pairs]
        features = np.asarray(theta["features"]["table"])[prompts]
        return Linear(features, np.array(theta["unembedding"]["table"]))

    return _race("linear-softmax", config, apply, [t for _, t in policies], pairs, configs, copy)


def _race(
    task: str,
    config: SweepConfig,
    apply: Apply,
    thetas: list[Theta],
    pairs: list[Pair],
    configs: list[RunConfig],
    copy: Callable[[], Any],
) -> SweepMeasurement:
    """Both contestants in turn within each repeat; ``copy`` makes the first policy in PyTorch."""
    stacked, batch, seeds = (
        jax.tree.map(lambda *xs: np.stack(xs), *thetas),
        packed(pairs),
        range(len(thetas)),
    )
    first, runs = configs[0], len(configs) * len(thetas)

    def ours() -> tuple[float, np.ndarray]:
        begin = time.perf_counter()
        found = sweep(apply, stacked, batch, configs, seeds=seeds)
        return time.perf_counter() - begin, found.change[0]

    def loop() -> tuple[float, np.ndarray]:
        import torch

        from simgrad.validation.torch_loop import tune

        torch.set_num_threads(os.cpu_count() or 1)
        order = first.recipe(seeds[0]).order(len(pairs))
        return tune(copy(), pairs, order, first.learning_rate, BETA)

    cold, change = ours()
    theirs = loop()[1] if importlib.util.find_spec("torch") is not None else None
    own, their = [], []
    for _ in range(config.repeats):
        own.append(ours()[0] / runs)
        if theirs is not None:
            their.append(np.mean([loop()[0] for _ in range(config.loops)]))
    ratios = np.array(their) / np.array(own) if their else None
    return SweepMeasurement(
        task=task,
        batch_size=first.batch_size or len(pairs),
        runs=runs,
        seconds=float(np.median(own)),
        loop=None if ratios is None else float(np.median(their)),
        ratio=None if ratios is None else float(np.median(ratios)),
        ratio_range=None if ratios is None else (float(ratios.min()), float(ratios.max())),
        compiling=cold - runs * float(np.median(own)),
        error=None
        if theirs is None
        else float(np.abs(change - theirs).max() / np.abs(theirs).max()),
    )
