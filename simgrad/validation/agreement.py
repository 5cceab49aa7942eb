"""One quantity by several routes, on several devices, in several dtypes: how far apart they are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simgrad import objectives
from simgrad.dynamics import Recipe, train
from simgrad.dynamics.linearized import linearized_run
from simgrad.models import TappedApply
from simgrad.theory import (
    PairKernel,
    displacement,
    entanglement_kernel,
    loss_gradient,
    optimizer_step,
    own_steps,
    pair_kernel,
    token_kernel,
)
from simgrad.theory.kernel.pair import Method
from simgrad.validation.cells import Base, first_update, step_of
from simgrad.validation.checks import Check, gap
from simgrad.validation.grid import optimizer
from simgrad.validation.measure import difference, measured_along, pulled

LIMITS = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}
"""Allowed distance of kernels from float64, relative to their own norms: some hundred roundoffs."""

Where = dict[str, str]


def _check(
    group: str, name: str, base: Base, where: Where, error: float, limit: float | None
) -> Check:
    return Check(group, name, base.subject.name, error=error, limit=limit, **where)


def against_reference(
    base: Base, reference: Base, where: Where, judged: bool, thorough: bool
) -> Iterator[Check]:
    """Kernels and log-probs against the same numbers in float64 on the CPU.

    The distance of a kernel is relative to ‖g‖‖g'‖, so that a small inner product of long gradients
    counts as such.
    """
    s, dtype = base.subject, where["arithmetic"].split()[0]
    limit = LIMITS[dtype] if judged else None
    own = base.every[: len(s.pairs)]
    if reference is not base:
        for (
            objective,
            force,
        ) in base.alone.items():  # some amplify the rounding of log-probs: shown, but for float64
            error = gap(force, reference.alone[objective])
            yield _check(
                "d_w, d_l", objective, base, where, error, limit if dtype == "float64" else None
            )
        yield _check("kernels", "log-probs", base, where, gap(base.logp, reference.logp), limit)
        yield _check(
            "kernels", "pair kernel", base, where, _distance(base.kernel, reference.kernel), limit
        )
    methods: tuple[Method, ...] = ()  # a context table has no other route than the plain one
    if isinstance(s.apply, TappedApply):
        methods = (
            ("plain", "ghost", "explicit") if thorough else ("plain",) if dtype == "float64" else ()
        )
    for method in methods:
        kernel = _joined([pair_kernel(s.apply, s.theta, pair, method=method) for pair in own])
        yield _check(
            "kernels",
            f"pair kernel, {method}",
            base,
            where,
            _distance(kernel, reference.kernel),
            limit,
        )
    if dtype == "float64" or thorough:
        tokens = jnp.concatenate([token_kernel(s.apply, s.theta, pair).sum((2, 4)) for pair in own])
        total = PairKernel(tokens[:, 0, 0], tokens[:, 0, 1], tokens[:, 1, 1])
        yield _check(
            "kernels",
            "token kernel, summed",
            base,
            where,
            _distance(total, reference.kernel),
            limit,
        )


def _joined(parts: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)


def _distance(kernel: PairKernel, exact: PairKernel) -> float:
    w, l = (np.sqrt(np.asarray(x, float)) for x in (exact.sq_chosen, exact.sq_rejected))  # noqa: E741
    scales = (w * w, w * l, l * l)
    names = ("sq_chosen", "inner", "sq_rejected")
    parts = [
        np.abs(np.asarray(getattr(kernel, n), float) - np.asarray(getattr(exact, n), float))
        / np.maximum(scale, 1e-300)
        for n, scale in zip(names, scales, strict=True)
    ]
    return float(np.max(parts))


def routes(
    base: Base, rates: Sequence[float], where: Where, limit: float = 1e-9
) -> Iterator[Check]:
    """Library functions that must agree, in float64; ``rates`` only set array shapes."""
    s, pair = base.subject, base.every[0]

    def check(name: str, ours: Any, theirs: Any) -> Check:
        return _check("routes", name, base, where, gap(ours, theirs), limit)

    force = base.alone["dpo"]
    step = pulled(s.apply, s.theta, pair, force[:1])
    change = displacement(s.apply, s.theta, pair, step)
    yield check(
        "own steps are steps on one pair", own_steps(s.apply, s.theta, pair, force[:1]), change
    )
    rate = jnp.asarray(0.1 / float(jnp.abs(change.first).max()))
    yield check(
        "the path integral is the difference",
        measured_along(s.apply, s.theta, pair, step, rate * jnp.asarray(rates) / max(rates))[-1],
        difference(s.apply, s.theta, pair, step, rate),
    )
    two = s.followed.take(np.arange(2))
    steps = [
        pulled(s.apply, s.theta, p, f[None]) for p, f in zip(base.every[:2], force[:2], strict=True)
    ]
    both = jax.tree.map(jnp.add, *steps)
    kernel = entanglement_kernel(s.apply, s.theta, two)
    yield check(
        "K c is the first order of a joint step",
        jnp.einsum("uv,v->u", kernel, force[:2].reshape(-1), precision="highest").reshape(-1, 2),
        _joined([displacement(s.apply, s.theta, p, both).first for p in base.every[:2]]),
    )


def updates(
    base: Base, optimizers: Sequence[str], where: Where, limit: float = 1e-9
) -> Iterator[Check]:
    """Every optimizer's first update by the library against the one that the cells step along."""
    s, loss = base.subject, objectives.get("dpo")
    for name in optimizers:
        reference = s.references(base.logp)
        ours = optimizer_step(
            s.apply, s.theta, s.batch, loss, optimizer(name), reference=reference
        ).direction
        yield _check(
            "routes",
            f"first update of {name}",
            base,
            where,
            gap(ours, first_update(base, "dpo", name)),
            limit,
        )


def runs(
    base: Base, where: Where, optimizers: Sequence[str], limit: float = 1e-9
) -> Iterator[Check]:
    """Training takes the predicted steps; relinearising at every step gives the run itself."""
    s, loss, steps = base.subject, objectives.get("dpo"), 6
    trained = base.every[: len(s.pairs)]
    for name in optimizers:
        unit = jnp.abs(
            _joined(
                [
                    displacement(s.apply, s.theta, p, step_of(base, "dpo", name)).first
                    for p in trained
                ]
            )
        )
        recipe = Recipe(loss, optimizer(name, 0.3 / float(unit.max()) / steps), steps, batch_size=2)
        order = jnp.asarray(recipe.order(len(s.pairs)))
        run = train(s.apply, s.theta, s.batch, recipe, record=[1, steps])
        step = optimizer_step(
            s.apply, s.theta, s.batch.take(order[0]), loss, recipe.optimizer
        ).direction
        one = _joined([difference(s.apply, s.theta, p, step, jnp.asarray(1.0)) for p in trained])
        error = gap(run.trajectory.change[1], one)
        yield _check(
            "routes", f"training takes the predicted first step ({name})", base, where, error, limit
        )
        same = linearized_run(
            s.apply,
            s.theta,
            s.batch,
            loss,
            recipe.optimizer,
            steps,
            order=order,
            refresh=1,
            read="ray",
        ).trajectory
        error = gap(same.change[-1], run.trajectory.change[-1])
        yield _check(
            "routes",
            f"linearised anew at every step it is the run ({name})",
            base,
            where,
            error,
            limit,
        )


def repeated(base: Base, rates: Sequence[float], where: Where) -> Iterator[Check]:
    """Bit for bit the same when done again, at some rates.

    Scattered additions on GPUs are not, unless XLA_FLAGS holds --xla_gpu_deterministic_ops=true:
    without it the difference is only shown there.
    """
    s = base.subject
    step = step_of(base, "dpo", "sgd")
    once, again = (
        [
            pair_kernel(s.apply, s.theta, base.every[0]),
            displacement(s.apply, s.theta, base.every[-1], step),
            measured_along(
                s.apply, s.theta, base.every[-1], step, jnp.asarray(rates, base.logp.dtype)
            ),
            step_of(base, "dpo", "sgd"),
        ]
        for _ in range(2)
    )
    same = all(
        np.array_equal(x, y)
        for x, y in zip(*(jax.tree.leaves(r) for r in (once, again)), strict=True)
    )
    exact = _platform(base) in ("cpu", "tpu") or "xla_gpu_deterministic_ops=true" in os.environ.get(
        "XLA_FLAGS", ""
    )
    name = "kernel, prediction, measurement and step, done twice"
    yield _check("determinism", name, base, where, float(not same), 0.0 if exact else None)


def _platform(base: Base) -> str:
    return next(iter(base.logp.devices())).platform


def between_devices(base: Base, where: Where, devices: Sequence[Any]) -> Iterator[Check]:
    """A loss gradient with the pairs spread over all devices against one device's."""
    s, loss = base.subject, objectives.get("dpo")
    count = len(devices)
    batch = s.batch.take(
        np.arange(count * -(-len(s.pairs) // count)) % len(s.pairs)
    )  # some twice: equally many each
    mesh = Mesh(np.array(devices[:count]), ("data",))
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    everywhere = jax.device_put(s.theta, NamedSharding(mesh, PartitionSpec()))
    ours = loss_gradient(s.apply, everywhere, spread, loss)
    limit = 100 * float(jnp.finfo(where["arithmetic"].split()[0]).eps)
    yield _check(
        "devices",
        f"a gradient over {count} devices",
        base,
        where,
        gap(ours, loss_gradient(s.apply, s.theta, batch, loss)),
        limit,
    )
