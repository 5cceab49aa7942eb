"""Tables about simgrad alone: what the cost formula predicts, and how cost grows."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from simgrad.pairs import packed, padded
from simgrad.theory import pair_kernel, responses
from simgrad.validation.bench.workbench import Reading, Workbench


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
        flops, calls = {}, {}
        for layout, method in itertools.product((padded, packed), ("ghost", "explicit")):
            batch, name = layout(here.pairs(prompt, response)), f"{layout.__name__} {method}"
            flops[name] = here.flops(batch, method == "ghost").total
            calls[name] = functools.partial(pair_kernel, method=method), batch
        costs = flops, here.medians(calls)
        predicted, measured = ({n: x / c["padded ghost"] for n, x in c.items()} for c in costs)
        chosen, fastest = (min(c, key=c.__getitem__) for c in (predicted, measured))
        found.append(Route(prompt, response, predicted, measured, chosen, fastest))
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
    (prompt, response), count = here.config.lengths[0], here.config.pairs
    batches = {
        "pairs": {k * count: here.pairs(prompt, response, k * count) for k in (1, 2, 4)},
        "tokens": {
            k * (prompt + response): here.pairs(k * prompt, k * response) for k in (1, 2, 4)
        },
    }
    found = []
    run: dict[str, Reading] = {"scoring": lambda *at: responses(*at).logp, "gradients": pair_kernel}
    for (grows, sized), task in itertools.product(batches.items(), run):
        calls = {str(size): (run[task], packed(pairs)) for size, pairs in sized.items()}
        times = tuple(here.medians(calls).values())
        slope = float(np.polyfit(np.log(list(sized)), np.log(times), 1)[0])
        found.append(Growth(task, grows, tuple(sized), times, slope))
    return found
