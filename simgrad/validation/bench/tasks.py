"""The tasks: simgrad's way, its bare passes, and the published procedure, on the same pairs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
import optax

from simgrad import objectives
from simgrad.bridge.engine.columns import score_batch
from simgrad.dynamics.directional import directional_score
from simgrad.dynamics.recipe import Recipe
from simgrad.models import Apply
from simgrad.pairs import Batch, Pair, packed, padded
from simgrad.theory import entanglement_kernel, pair_kernel, responses, token_kernel
from simgrad.theory.kernel import jacobian, kernel_plan
from simgrad.theory.kernel.cost import packing_pays, token_flops
from simgrad.typing import Array, Theta
from simgrad.validation import published
from simgrad.validation.bench.workbench import Reading, Workbench, race, ratio, timed


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One task on pairs of one length. Times are medians in seconds per pair.

    Attributes:
        task: a name of :data:`TASKS`.
        prompt: tokens.
        response: tokens.
        seconds: simgrad's time.
        published: the published procedure's time (None without torch).
        ratio: published / simgrad, within a repeat.
        ratio_range: smallest and largest.
        own_limit: simgrad's time over that of its own bare passes.
        own_range: smallest and largest.
        bare: what those are.
        flops: floating-point operations a pair by the formulas of
            :mod:`simgrad.theory.kernel.cost`.
        achieved: flops a second over those of a large matrix product in the same repeat.
        ceiling: the product's best flops a second.
        bytes: parameters' bytes times the passes over them, a batch: the least that has to be
            moved.
        temporary: bytes of temporary memory the compiled program needs, beyond parameters and
            results.
        error: largest difference of the results from float64-accumulated dot products of PyTorch's
            gradients, relative to each number (kernels of many entries: to the largest).
    """

    task: str
    prompt: int
    response: int
    seconds: float
    published: float | None = None
    ratio: float | None = None
    ratio_range: tuple[float, float] | None = None
    own_limit: float
    own_range: tuple[float, float]
    bare: str
    flops: int
    achieved: float
    ceiling: float
    bytes: int
    temporary: int
    error: float | None = None


def _numbers(got: Any) -> np.ndarray:
    return np.asarray(got, np.float64)


@dataclass(frozen=True)
class Task:
    """Contestants and what they are held against.

    Attributes:
        ours: simgrad's way.
        temporary: bytes of temporary memory it needs.
        bare: simgrad's bare passes.
        bare_name: what those are.
        published: the published procedure on a model and pairs; ``wide``, with dot products in
            float64, it is the reference.
        flops: operations a pair.
        passes: over the parameters.
        read: numbers of simgrad's result.
        scale: multiplies the published time, as the procedure may do a part of the work.
        bare_times: multiplies the bare passes' time.
        entries: whether errors are relative to the largest number.
    """

    ours: Callable[[], Any]
    temporary: int
    bare: Callable[[], Any]
    bare_name: str
    published: Callable[..., Any]
    flops: int
    passes: int
    read: Callable[[Any], np.ndarray] = _numbers
    scale: float = 1.0
    bare_times: float = 1.0
    entries: bool = False


def measure(task: str, here: Workbench, prompt: int, response: int) -> Measurement:
    """Time one task of :data:`TASKS` on pairs of one length."""
    pairs = here.pairs(prompt, response, 1 if task == "tokens" else None)
    made = TASKS[task](here, pairs)
    contestants = {"simgrad": made.ours, "bare": made.bare, "product": here.product}
    if here.model is not None:
        contestants["published"] = lambda: made.published(here.model, pairs)
    clocks = {name: timed(call) for name, call in contestants.items()}
    times, beside = race(clocks, here.config.repeats), {}
    if here.model is not None:
        theirs = times["published"] * made.scale
        beside["published"] = float(np.median(theirs)) / len(pairs)
        beside["ratio"], beside["ratio_range"] = ratio(theirs, times["simgrad"])
        reference = np.asarray(made.published(here.model, pairs, wide=True))
        size = np.abs(reference).max() if made.entries else np.abs(reference)
        beside["error"] = float(np.max(np.abs(made.read(made.ours()) - reference) / size))
    own_limit, own_range = ratio(times["simgrad"], times["bare"] * made.bare_times)
    work = made.flops * len(pairs) / here.product_flops
    return Measurement(
        task=task,
        prompt=prompt,
        response=response,
        seconds=float(np.median(times["simgrad"])) / len(pairs),
        own_limit=own_limit,
        own_range=own_range,
        bare=made.bare_name,
        flops=made.flops,
        achieved=work * ratio(times["product"], times["simgrad"])[0],
        ceiling=float(here.product_flops / times["product"].min()),
        bytes=made.passes * sum(x.nbytes for x in jax.tree.leaves(here.policy.theta)),
        temporary=made.temporary,
        **beside,
    )


def _logp(apply: Apply, theta: Theta, batch: Batch) -> Array:
    return responses(apply, theta, batch).logp


def _gradient(apply: Apply, theta: Theta, batch: Batch) -> Theta:
    return jax.grad(lambda t: _logp(apply, t, batch).sum())(theta)


_BARE = {"forward": _logp, "forward + backward": _gradient}


def _task(
    here: Workbench,
    ours: Reading,
    batch: Batch,
    bare: Literal["forward", "forward + backward"] = "forward + backward",
    once: str = "",
    bare_batch: Batch | None = None,
    **rest: Any,
) -> Task:
    """A compiled task on a batch; ``once`` says per what its bare passes count."""
    call, temporary = here.compiled(ours, batch)
    passes, _ = here.compiled(_BARE[bare], batch if bare_batch is None else bare_batch)
    return Task(call, temporary, passes, bare + once, **rest)


def _columns(*arrays: Array) -> np.ndarray:
    return np.stack([_numbers(x) for x in arrays], -1)


def _scoring(here: Workbench, pairs: list[Pair]) -> Task:
    objective, batch = objectives.get("dpo"), packed(pairs)
    return _task(
        here,
        lambda *at: score_batch(*at, objective, 1.0, gradients=False),
        batch,
        "forward",
        read=lambda got: _columns(got["logp_chosen"], got["logp_rejected"], got["ches"]),
        published=published.forward_scores,
        flops=here.flops(batch).forward,
        passes=1,
    )


def _log_probs(here: Workbench, pairs: list[Pair]) -> Task:
    batch = packed(pairs)
    return _task(
        here,
        _logp,
        batch,
        "forward",
        published=published.log_probs,
        flops=here.flops(batch).forward,
        passes=1,
    )


def _gradients(here: Workbench, pairs: list[Pair]) -> Task:
    prompt, response = len(pairs[0].prompt), len(pairs[0].chosen)
    layout = packed if packing_pays(here.shapes, prompt, response, response) else padded
    batch = layout(pairs)
    return _task(
        here,
        pair_kernel,
        batch,
        bare_batch=padded(pairs),
        read=lambda got: _columns(got.sq_chosen, got.inner, got.sq_rejected),
        published=published.gradient_scalars,
        flops=here.flops(batch).total,
        passes=2,
    )


def _tokens(here: Workbench, pairs: list[Pair]) -> Task:
    batch, rows = padded(pairs), len(pairs[0].chosen)
    some = np.unique(np.linspace(0, rows - 1, min(here.config.sample, rows)).astype(int))
    return _task(
        here,
        token_kernel,
        batch,
        once=", once a token",
        read=lambda got: _numbers(got)[0, 0, :, 0][np.ix_(some, some)],
        published=functools.partial(published.token_kernel, tokens=some.tolist()),
        flops=token_flops(here.shapes, batch.tokens.shape[-1], rows),
        passes=2,
        scale=2 * rows / len(some),
        bare_times=float(rows),
        entries=True,
    )


def _dataset(here: Workbench, pairs: list[Pair]) -> Task:
    apply, theta, batch = here.policy.apply, here.policy.theta, packed(pairs)
    count = sum(x.size for x in jax.tree.leaves(theta))
    memory = 4 * 2 * len(pairs) * count  # all gradients at once, as the published procedure does
    rows = _task(
        here,
        jacobian,
        batch,
        once=", once a response",
        published=published.dataset_kernel,
        flops=5 * here.flops(batch).forward + 2 * 2 * 2 * len(pairs) * count,
        passes=1 + 2 * 2,
        bare_times=2.0,
        entries=True,
    )
    return dataclasses.replace(
        rows,
        ours=lambda: entanglement_kernel(apply, theta, batch, memory=memory),
        temporary=rows.temporary + kernel_plan(apply, theta, len(pairs), memory=memory).bytes,
    )


def _directional(here: Workbench, pairs: list[Pair]) -> Task:
    dpo, rate, batch = objectives.DPO(), 1e-3, packed(pairs)
    recipe = Recipe(dpo, optax.sgd(rate), steps=1)
    pull = rate * dpo.beta / 2  # d_w = d_l = β σ(0) where the policy is its own reference
    return _task(
        here,
        lambda apply, theta, batch: directional_score(apply, theta, batch, recipe).change,
        batch,
        published=functools.partial(published.directional_changes, coefficient=pull),
        flops=6 * here.flops(batch).forward,
        passes=1 + 2 + 2,
        entries=True,
    )


TASKS: dict[str, Callable[[Workbench, list[Pair]], Task]] = {
    "scoring": _scoring,
    "logprobs": _log_probs,
    "gradients": _gradients,
    "tokens": _tokens,
    "dataset": _dataset,
    "directional": _directional,
}
"""What is timed, one task each.

These are every forward-only column, log-probs alone, the three gradient scalars, the token kernel
of one pair, the kernel of all responses, the directional score of one full-batch step."""
