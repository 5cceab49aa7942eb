"""One quantity by several routes, on several devices, in several dtypes: how far apart they are."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
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
from simgrad.validation.checks import Check, gap
from simgrad.validation.grid import TABLES, Grid, optimizer
from simgrad.validation.measure import difference, measured_along, pulled
from simgrad.validation.subjects import Base, joined, step_of

LIMITS = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}
"""Allowed distance of kernels from float64, relative to their own norms: some hundred roundoffs."""
ROUTES = 1e-9
"""Allowed distance of two routes to one quantity in float64."""

Both = tuple[str, Any, Any]
"""What must agree, and two routes to it."""


def identities(grid: Grid, base: Base, reference: Base) -> Iterator[Check]:
    """Everything that must agree for one model in one arithmetic."""
    rates, tables = grid.learning_rates or grid.rates, base.name in TABLES
    yield from against_reference(base, reference, grid.thorough)
    yield repeated(base, rates)
    alone = grid.subjects == (base.name,)
    if base.arithmetic.dtype == "float64" and (grid.thorough or alone or not tables):
        trained = ("sgd", "adam") if grid.thorough else ("adam",)
        parts = routes(base, rates), updates(base, grid.optimizers), runs(base, trained)
        yield from agreed(base, itertools.chain(*parts))


def agreed(base: Base, found: Iterable[Both]) -> Iterator[Check]:
    """Judge what :func:`routes`, :func:`updates` and :func:`runs` give."""
    for name, ours, theirs in found:
        yield base.check("routes", name, gap(ours, theirs), ROUTES)


def against_reference(base: Base, reference: Base, thorough: bool) -> Iterator[Check]:
    """Kernels and log-probs against the same numbers in float64 on the CPU.

    The distance of a kernel is relative to ‖g‖‖g'‖, so that a small inner product of long gradients
    counts as such.
    """
    dtype = base.arithmetic.dtype
    limit = LIMITS[dtype] if base.arithmetic.precision == "highest" else None
    exact, kernels = dtype == "float64", {}
    if reference is not base:
        # some objectives amplify the rounding of log-probs: shown, but for float64
        for objective, force in base.alone.items():
            error = gap(force, reference.alone[objective])
            yield base.check("d_w, d_l", objective, error, limit if exact else None)
        yield base.check("kernels", "log-probs", gap(base.logp, reference.logp), limit)
        kernels["pair kernel"] = base.kernel
    methods: tuple[Method, ...] = ()
    if isinstance(base.apply, TappedApply):  # a context table has no other route than the plain one
        methods = ("plain", "ghost", "explicit") if thorough else ("plain",) if exact else ()
    for method in methods:
        found = (pair_kernel(*base.policy, pair, method=method) for pair in base.trained)
        kernels[f"pair kernel, {method}"] = joined(found)
    if exact or thorough:
        tokens = (token_kernel(*base.policy, pair) for pair in base.trained)
        kernels["token kernel, summed"] = joined(summed(kernel) for kernel in tokens)
    for name, kernel in kernels.items():
        yield base.check("kernels", name, _distance(kernel, reference.kernel), limit)


def summed(tokens: jax.Array) -> PairKernel:
    """The pair kernel that a token kernel of shape (B, 2, R, 2, R) adds up to."""
    total = tokens.sum((2, 4))
    return PairKernel(total[:, 0, 0], total[:, 0, 1], total[:, 1, 1])


def _distance(kernel: PairKernel, exact: PairKernel) -> float:
    ours, theirs = (np.asarray(x.matrix, float) for x in (kernel, exact))
    norms = np.sqrt(np.diagonal(theirs, axis1=-2, axis2=-1))
    scale = norms[..., :, None] * norms[..., None, :]
    return float(np.max(np.abs(ours - theirs) / np.maximum(scale, 1e-300)))


def routes(base: Base, rates: Sequence[float]) -> Iterator[Both]:
    """Library functions that must agree, in float64; ``rates`` only set array shapes."""
    pair, two = base.every[0], base.every[:2]
    force = base.alone["dpo"][:2]
    steps = [pulled(*base.policy, p, f[None]) for p, f in zip(two, force, strict=True)]
    change = displacement(*base.policy, pair, steps[0])
    own = own_steps(*base.policy, pair, force[:1])
    yield "own steps are steps on one pair", own, change

    rate = jnp.asarray(0.1 / float(jnp.abs(change.first).max()))
    along = rate * jnp.asarray(rates) / max(rates)
    path = measured_along(*base.policy, pair, steps[0], along)[-1]
    plain = difference(*base.policy, pair, steps[0], rate)
    yield "the path integral is the difference", path, plain

    kernel = entanglement_kernel(*base.policy, base.followed.take(np.arange(2)))
    moved = jnp.einsum("uv,v->u", kernel, force.reshape(-1), precision="highest").reshape(-1, 2)
    both = jax.tree.map(jnp.add, *steps)
    first = joined(displacement(*base.policy, p, both).first for p in two)
    yield "K c is the first order of a joint step", moved, first


def updates(base: Base, optimizers: Sequence[str]) -> Iterator[Both]:
    """Every optimizer's first update by the library against the one that the cells step along."""
    loss, reference = objectives.get("dpo"), base.references(base.logp)
    for name in optimizers:
        chain = optimizer(name)
        ours = optimizer_step(*base.policy, base.batch, loss, chain, reference=reference)
        theirs = step_of(base, base.together["dpo"], name, settled=False)
        yield f"first update of {name}", ours.direction, theirs


def runs(base: Base, optimizers: Sequence[str]) -> Iterator[Both]:
    """Training takes the predicted steps; relinearising at every step gives the run itself."""
    loss, steps = objectives.get("dpo"), 6
    for name in optimizers:
        unit = step_of(base, base.together["dpo"], name)
        change = joined(displacement(*base.policy, p, unit).first for p in base.trained)
        rate = 0.3 / float(jnp.abs(change).max()) / steps
        recipe = Recipe(loss, optimizer(name, rate), steps, batch_size=2)
        order = jnp.asarray(recipe.order(len(base.pairs)))
        run = train(*base.policy, base.batch, recipe, record=[1, steps]).trajectory.change

        first = base.batch.take(order[0])
        step = optimizer_step(*base.policy, first, loss, recipe.optimizer).direction
        one = joined(difference(*base.policy, p, step, jnp.asarray(1.0)) for p in base.trained)
        yield f"training takes the predicted first step ({name})", run[1], one

        task = *base.policy, base.batch, loss, recipe.optimizer, steps
        same = linearized_run(*task, order=order, refresh=1, read="ray").trajectory.change
        yield f"linearised anew at every step it is the run ({name})", same[-1], run[-1]


def repeated(base: Base, rates: Sequence[float]) -> Check:
    """Bit for bit the same when done again, at some rates.

    Scattered additions on GPUs are not, unless XLA_FLAGS holds --xla_gpu_deterministic_ops=true:
    without it the difference is only shown there.
    """
    step = step_of(base, base.together["dpo"], "sgd")
    last, along = base.every[-1], jnp.asarray(rates, base.logp.dtype)

    def everything() -> list[jax.Array]:
        kernel = pair_kernel(*base.policy, base.every[0])
        change = displacement(*base.policy, last, step)
        path = measured_along(*base.policy, last, step, along)
        again = step_of(base, base.together["dpo"], "sgd")
        return jax.tree.leaves([kernel, change, path, again])

    same = all(map(np.array_equal, everything(), everything()))
    flags = os.environ.get("XLA_FLAGS", "")
    exact = base.device.platform in ("cpu", "tpu") or "xla_gpu_deterministic_ops=true" in flags
    name = "kernel, prediction, measurement and step, done twice"
    return base.check("determinism", name, float(not same), 0.0 if exact else None)


def between_devices(base: Base, devices: Sequence[Any]) -> Check:
    """A loss gradient with the pairs spread over all devices against one device's."""
    loss, count = objectives.get("dpo"), len(devices)
    each = -(-len(base.pairs) // count)  # equally many on every device: some pairs come twice
    batch = base.batch.take(np.arange(count * each) % len(base.pairs))
    mesh = Mesh(np.array(devices), ("data",))
    spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    everywhere = jax.device_put(base.theta, NamedSharding(mesh, PartitionSpec()))
    ours = loss_gradient(base.apply, everywhere, spread, loss)
    error = gap(ours, loss_gradient(*base.policy, batch, loss))
    limit = 200 * base.arithmetic.rounding
    return base.check("devices", f"a gradient over {count} devices", error, limit)
