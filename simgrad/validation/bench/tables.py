"""Tables about simgrad alone: what the cost formula predicts, and how cost grows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from simgrad.pairs import packed, padded
from simgrad.theory import pair_kernel, responses
from simgrad.theory.kernel.cost import kernel_flops
from simgrad.theory.kernel.pair import Method
from simgrad.validation.bench.tasks import compiled
from simgrad.validation.bench.workbench import Workbench, race

_ROUTES: tuple[Method, ...] = ("ghost", "explicit")


@dataclass(frozen=True)
class Route:
    """Ways to a pair kernel on pairs of one length, each as a multiple of the padded ghost route.

    Attributes:
        prompt: tokens.
        response: tokens.
        predicted: flops by the formula.
        measured: median time.
        chosen: the way that the formula picks.
        fastest: the way that took least time.
    """

    prompt: int
    response: int
    predicted: dict[str, float]
    measured: dict[str, float]
    chosen: str
    fastest: str


def routes(here: Workbench) -> list[Route]:
    """Time both layouts with both routes, forced for every leaf, on each length."""
    found = []
    for prompt, response in here.config.lengths:
        pairs, flops, calls = here.pairs(prompt, response), {}, {}
        for layout, method in itertools.product(("padded", "packed"), _ROUTES):
            batch = (packed if layout == "packed" else padded)(pairs)
            name, length = f"{layout} {method}", batch.tokens.shape[-1]
            flops[name] = kernel_flops(
                here.shapes, length, response, layout == "packed", method == "ghost"
            ).total
            calls[name], _ = compiled(
                lambda theta, b=batch, m=method: pair_kernel(here.policy.apply, theta, b, method=m),
                here.policy.theta,
            )
        times = {name: float(np.median(t)) for name, t in race(calls, here.config.repeats).items()}
        base = "padded ghost"
        found.append(
            Route(
                prompt,
                response,
                {name: f / flops[base] for name, f in flops.items()},
                {name: t / times[base] for name, t in times.items()},
                min(flops, key=lambda name: flops[name]),
                min(times, key=lambda name: times[name]),
            )
        )
    return found


@dataclass(frozen=True)
class Growth:
    """How the time of a batch grows with one of its sizes.

    Attributes:
        task: ``scoring`` or ``gradients``.
        grows: ``pairs`` or ``tokens``.
        sizes: of the batch.
        seconds: median times.
        exponent: slope of log seconds in log size; 1 is linear.
    """

    task: str
    grows: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    exponent: float


def growth(here: Workbench) -> list[Growth]:
    """Time 1, 2 and 4 times as many pairs, and prompts and responses 1, 2 and 4 times as long."""
    (prompt, response), apply = here.config.lengths[0], here.policy.apply
    batches = {
        "pairs": {
            k * here.config.pairs: here.pairs(prompt, response, k * here.config.pairs)
            for k in (1, 2, 4)
        },
        "tokens": {
            k * (prompt + response): here.pairs(k * prompt, k * response) for k in (1, 2, 4)
        },
    }
    found = []
    for grows, sized in batches.items():
        for task in ("scoring", "gradients"):
            calls = {}
            for size, pairs in sized.items():
                batch = packed(pairs)
                run = (
                    (lambda theta, b=batch: responses(apply, theta, b).logp)
                    if task == "scoring"
                    else (lambda theta, b=batch: pair_kernel(apply, theta, b))
                )
                calls[str(size)] = compiled(run, here.policy.theta)[0]
            times = tuple(float(np.median(t)) for t in race(calls, here.config.repeats).values())
            slope = float(np.polyfit(np.log(list(sized)), np.log(times), 1)[0])
            found.append(Growth(task, grows, tuple(sized), times, slope))
    return found
