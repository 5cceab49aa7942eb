"""The tasks: simgrad's way, its bare passes, and the published procedure, on the same pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from simgrad import objectives
from simgrad.bridge.engine.columns import score_batch
from simgrad.dynamics.directional import directional_score
from simgrad.dynamics.recipe import Recipe
from simgrad.pairs import Batch, Pair, packed, padded
from simgrad.theory import entanglement_kernel, pair_kernel, responses, token_kernel
from simgrad.theory.kernel import kernel_plan
from simgrad.theory.kernel.cost import kernel_flops, packing_pays, token_flops
from simgrad.theory.kernel.dataset import jacobian
from simgrad.typing import Array, Theta
from simgrad.validation import published
from simgrad.validation.bench.workbench import Workbench, race


@dataclass(frozen=True)
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
    published: float | None
    ratio: float | None
    ratio_range: tuple[float, float] | None
    own_limit: float
    own_range: tuple[float, float]
    bare: str
    flops: int
    achieved: float
    ceiling: float
    bytes: int
    temporary: int
    error: float | None


@dataclass(frozen=True)
class Task:
    """Contestants and what they are held against.

    ``scale`` multiplies the published time (it may do a part of the work), ``bare_times`` the bare
    pass's.
    """

    ours: Callable[[], Any]
    read: Callable[[Any], np.ndarray]
    bare: Callable[[], Any]
    bare_name: str
    published: Callable[[Any], Any]
    reference: Callable[[Any], Any]
    flops: int
    passes: int
    temporary: int
    scale: float = 1.0
    bare_times: float = 1.0
    entries: bool = False


def measure(task: str, here: Workbench, prompt: int, response: int) -> Measurement:
    """Time one task of :data:`TASKS` on pairs of one length."""
    pairs = here.pairs(prompt, response, 1 if task == "tokens" else None)
    made = TASKS[task](here, pairs)
    contestants = {"simgrad": made.ours, "bare": made.bare, "product": here.product}
    if here.model is not None:
        contestants["published"] = lambda: made.published(here.model)
    times = race(contestants, here.config.repeats)
    limit = times["simgrad"] / (times["bare"] * made.bare_times)
    ratios = error = None
    if here.model is not None:
        times["published"] = times["published"] * made.scale
        ratios = times["published"] / times["simgrad"]
        ours, theirs = made.read(made.ours()), np.asarray(made.reference(here.model))
        error = float(
            np.max(
                np.abs(ours - theirs) / (np.abs(theirs).max() if made.entries else np.abs(theirs))
            )
        )
    each = float(np.median(times["simgrad"])) / len(pairs)
    speed, ceiling = (
        made.flops * len(pairs) / times["simgrad"],
        here.product_flops / times["product"],
    )
    return Measurement(
        task=task,
        prompt=prompt,
        response=response,
        seconds=each,
        published=None if ratios is None else float(np.median(times["published"])) / len(pairs),
        ratio=None if ratios is None else float(np.median(ratios)),
        ratio_range=None if ratios is None else (float(ratios.min()), float(ratios.max())),
        own_limit=float(np.median(limit)),
        own_range=(float(limit.min()), float(limit.max())),
        bare=made.bare_name,
        flops=made.flops,
        achieved=float(np.median(speed / ceiling)),
        ceiling=float(ceiling.max()),
        bytes=made.passes * sum(x.nbytes for x in jax.tree.leaves(here.policy.theta)),
        temporary=made.temporary,
        error=error,
    )


def compiled(f: Callable[[Theta], Any], theta: Theta) -> tuple[Callable[[], Any], int]:
    """The compiled call, and the temporary memory it needs."""
    program = jax.jit(f).lower(theta).compile()
    memory = program.memory_analysis()
    return lambda: program(theta), 0 if memory is None else memory.temp_size_in_bytes


def _columns(*arrays: Array) -> np.ndarray:
    return np.stack([np.asarray(x, np.float64) for x in arrays], -1)


def _gradient(here: Workbench, batch: Batch) -> Callable[[], Any]:
    """A bare forward and backward pass."""
    apply = here.policy.apply
    return compiled(jax.grad(lambda t: responses(apply, t, batch).logp.sum()), here.policy.theta)[0]


def _forward_task(
    here: Workbench, pairs: list[Pair], ours: Callable[[Theta, Batch], Any], **rest: Any
) -> Task:
    apply, theta, batch = here.policy.apply, here.policy.theta, packed(pairs)
    call, temporary = compiled(lambda theta: ours(theta, batch), theta)
    length, rows = batch.tokens.shape[-1], batch.targets.shape[-1]
    flops = kernel_flops(here.shapes, length, rows, packed=True).forward
    bare = compiled(lambda theta: responses(apply, theta, batch).logp, theta)[0]
    return Task(
        ours=call,
        bare=bare,
        bare_name="forward",
        flops=flops,
        passes=1,
        temporary=temporary,
        **rest,
    )


def _scoring(here: Workbench, pairs: list[Pair]) -> Task:
    objective = objectives.get("dpo")

    def published_scores(model: Any) -> list[tuple[float, float, float]]:
        return [published.forward_scores(model, p) for p in pairs]

    return _forward_task(
        here,
        pairs,
        lambda theta, batch: score_batch(
            here.policy.apply, theta, batch, objective, 1.0, gradients=False
        ),
        read=lambda got: _columns(got["logp_chosen"], got["logp_rejected"], got["ches"]),
        published=published_scores,
        reference=published_scores,
    )


def _log_probs(here: Workbench, pairs: list[Pair]) -> Task:
    def published_log_probs(model: Any) -> list[tuple[float, float]]:
        return [published.log_probs(model, p) for p in pairs]

    return _forward_task(
        here,
        pairs,
        lambda theta, batch: responses(here.policy.apply, theta, batch).logp,
        read=np.asarray,
        published=published_log_probs,
        reference=published_log_probs,
    )


def _gradients(here: Workbench, pairs: list[Pair]) -> Task:
    prompt, response = len(pairs[0].prompt), len(pairs[0].chosen)
    layout = packed if packing_pays(here.shapes, prompt, response, response) else padded
    batch = layout(pairs)
    call, temporary = compiled(
        lambda theta: pair_kernel(here.policy.apply, theta, batch), here.policy.theta
    )
    return Task(
        ours=call,
        read=lambda got: _columns(got.sq_chosen, got.inner, got.sq_rejected),
        bare=_gradient(here, padded(pairs)),
        bare_name="forward + backward",
        published=lambda model: [published.gradient_scalars(model, p) for p in pairs],
        reference=lambda model: [published.gradient_scalars(model, p, wide=True) for p in pairs],
        flops=kernel_flops(here.shapes, batch.tokens.shape[-1], response, layout is packed).total,
        passes=2,
        temporary=temporary,
    )


def _tokens(here: Workbench, pairs: list[Pair]) -> Task:
    batch, rows = padded(pairs), len(pairs[0].chosen)
    some = np.unique(np.linspace(0, rows - 1, min(here.config.sample, rows)).astype(int))
    call, temporary = compiled(
        lambda theta: token_kernel(here.policy.apply, theta, batch), here.policy.theta
    )
    return Task(
        ours=call,
        read=lambda got: np.asarray(got, np.float64)[0, 0, :, 0][np.ix_(some, some)],
        bare=_gradient(here, batch),
        bare_name="forward + backward, once a token",
        published=lambda model: published.token_kernel(model, pairs[0], some.tolist()),
        reference=lambda model: published.token_kernel(model, pairs[0], some.tolist(), wide=True),
        flops=token_flops(here.shapes, batch.tokens.shape[-1], rows),
        passes=2,
        temporary=temporary,
        scale=2 * rows / len(some),
        bare_times=float(rows),
        entries=True,
    )


def _dataset(here: Workbench, pairs: list[Pair]) -> Task:
    apply, theta, batch = here.policy.apply, here.policy.theta, packed(pairs)
    count = sum(x.size for x in jax.tree.leaves(theta))
    memory = (
        4 * 2 * len(pairs) * count
    )  # all gradients at once, as the published procedure keeps them
    plan = kernel_plan(apply, theta, len(pairs), memory=memory)
    _, temporary = compiled(lambda theta: jacobian(apply, theta, batch), theta)
    forward = kernel_flops(
        here.shapes, batch.tokens.shape[-1], batch.targets.shape[-1], packed=True
    ).forward
    return Task(
        ours=lambda: entanglement_kernel(apply, theta, batch, memory=memory),
        read=lambda got: np.asarray(got, np.float64),
        bare=_gradient(here, batch),
        bare_name="forward + backward, once a response",
        published=lambda model: published.dataset_kernel(model, pairs),
        reference=lambda model: published.dataset_kernel(model, pairs, wide=True),
        flops=5 * forward + 2 * 2 * 2 * len(pairs) * count,
        passes=1 + 2 * 2,
        temporary=plan.bytes + temporary,
        bare_times=2.0,
        entries=True,
    )


def _directional(here: Workbench, pairs: list[Pair]) -> Task:
    apply, rate = here.policy.apply, 1e-3
    dpo, batch = objectives.DPO(), packed(pairs)
    recipe = Recipe(dpo, optax.sgd(rate), steps=1)
    call, temporary = compiled(
        lambda theta: directional_score(apply, theta, batch, recipe).change, here.policy.theta
    )
    pull = rate * dpo.beta / 2  # d_w = d_l = β σ(0) where the policy is its own reference
    forward = kernel_flops(
        here.shapes, batch.tokens.shape[-1], batch.targets.shape[-1], packed=True
    ).forward
    return Task(
        ours=call,
        read=lambda got: np.asarray(got, np.float64),
        bare=_gradient(here, batch),
        bare_name="forward + backward",
        published=lambda model: published.directional_changes(model, pairs, pull),
        reference=lambda model: published.directional_changes(model, pairs, pull, wide=True),
        flops=6 * forward,
        passes=1 + 2 + 2,
        temporary=temporary,
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
