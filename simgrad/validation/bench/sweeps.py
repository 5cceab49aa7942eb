"""Speed of sweeps beside a plain PyTorch loop for every run, as ratios from one process.

The loop is DPO as one would write it: one forward pass over chosen and rejected together,
``log_softmax`` and ``gather``, ``loss.backward()``, ``optimizer.step()``. Both sides start from the
same parameters, take the same batches in the same order, and are compared in what the runs did to
the log-probs.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from simgrad.dynamics.configs import RunConfig, grid
from simgrad.dynamics.sweep import sweep
from simgrad.models import Apply, ModelConfig, create, linear_softmax
from simgrad.objectives import DPO
from simgrad.pairs import Pair, packed
from simgrad.typing import Theta
from simgrad.validation.bench.workbench import machine, race, ratio, torch_version
from simgrad.validation.checks import gap

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


@dataclass(frozen=True, kw_only=True)
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
    loop: float | None = None
    ratio: float | None = None
    ratio_range: tuple[float, float] | None = None
    compiling: float
    error: float | None = None


def bench_sweeps(
    config: SweepConfig = SweepConfig(), report: Callable[[SweepMeasurement], None] = lambda _: None
) -> dict[str, Any]:
    """Time sweeps of a transformer and of a linear-softmax model; returns a record for JSON."""
    tasks = [functools.partial(_transformer, batch_size=size) for size in config.batch_sizes]
    measurements = []
    for task in (*tasks, _linear):
        found = task(config)
        report(found)
        measurements.append(asdict(found))
    return {
        "config": asdict(config),
        "provenance": {**machine(), "devices": jax.local_device_count()},
        "measurements": measurements,
    }


def _pairs(config: SweepConfig, count: int, prompt: int, response: int) -> list[Pair]:
    """Random pairs; no two prompts begin alike, no rejected token is the chosen one there."""
    random, size = np.random.default_rng(0), config.vocab_size
    prompts = random.integers(0, size, (count, prompt))
    prompts[:, 0] = np.arange(count)
    chosen = random.integers(0, size, (count, response))
    rejected = (chosen + random.integers(1, size, chosen.shape)) % size
    tokens = zip(prompts.tolist(), chosen.tolist(), rejected.tolist(), strict=True)
    return [Pair(*sides) for sides in tokens]


def _transformer(config: SweepConfig, batch_size: int) -> SweepMeasurement:
    pairs = _pairs(config, config.pairs, config.prompt, config.response)
    shape = ModelConfig(
        vocab_size=config.vocab_size,
        width=config.width,
        depth=config.depth,
        max_length=config.prompt + config.response,
    )
    policies = [create(shape, seed) for seed in range(config.seeds)]
    rate, steps = config.learning_rate, config.steps
    configs = grid(optimizer="sgd", learning_rate=rate, steps=steps, batch_size=batch_size)

    name = f"{config.depth}-layer transformer"
    copy = lambda torch_loop: torch_loop.transformer(policies[0][1], shape, pairs)  # noqa: E731
    return _race(name, config, policies, pairs, configs, copy)


def _linear(config: SweepConfig) -> SweepMeasurement:
    pairs, width = _pairs(config, config.linear_pairs, 1, 1), config.linear_width
    seeds = range(config.linear_seeds)
    policies = [linear_softmax(pairs, config.vocab_size, width, seed) for seed in seeds]
    rates = np.geomspace(10, 100, config.linear_rates) * config.learning_rate
    configs = grid(optimizer="sgd", learning_rate=rates, steps=config.steps)

    copy = lambda torch_loop: torch_loop.linear(*policies[0], pairs)  # noqa: E731
    return _race("linear-softmax", config, policies, pairs, configs, copy)


def _race(
    task: str,
    config: SweepConfig,
    policies: Sequence[tuple[Apply, Theta]],
    pairs: list[Pair],
    configs: list[RunConfig],
    copy: Callable[[Any], Any],
) -> SweepMeasurement:
    """Both contestants in turn within each repeat.

    ``copy`` makes the first policy in PyTorch, given :mod:`simgrad.validation.torch_loop`.
    """
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *(theta for _, theta in policies))
    batch, seeds, first = packed(pairs), range(len(policies)), configs[0]
    runs, changes = len(configs) * len(policies), {}

    def ours() -> float:
        begin = time.perf_counter()
        found = sweep(policies[0][0], stacked, batch, configs, seeds=seeds)
        changes["simgrad"] = found.change[0]
        return (time.perf_counter() - begin) / runs

    def once() -> float:
        from simgrad.validation import torch_loop

        order, model = first.recipe(seeds[0]).order(len(pairs)), copy(torch_loop)
        seconds, changes["loop"] = torch_loop.tune(model, order, first.learning_rate, BETA)
        return seconds

    contestants = {"simgrad": ours}
    if torch_version() is not None:
        contestants["loop"] = lambda: float(np.mean([once() for _ in range(config.loops)]))
    cold = race(contestants, 1)["simgrad"][0]
    times, beside = race(contestants, config.repeats), {}
    seconds = float(np.median(times["simgrad"]))
    if "loop" in times:
        beside["loop"] = float(np.median(times["loop"]))
        beside["ratio"], beside["ratio_range"] = ratio(times["loop"], times["simgrad"])
        beside["error"] = gap(changes["simgrad"], changes["loop"])
    return SweepMeasurement(
        task=task,
        batch_size=first.batch_size or len(pairs),
        runs=runs,
        seconds=seconds,
        compiling=runs * float(cold - seconds),
        **beside,
    )
