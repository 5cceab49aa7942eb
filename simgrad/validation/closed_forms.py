"""Closed forms of the theory against automatic differentiation, on the device at hand.

The oracle is the Jacobian of log-probs, one plain backward pass a response; each closed form reads
a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from simgrad.models import ContextApply, bind
from simgrad.pairs import Batch, Pair, padded
from simgrad.theory import (
    PairKernel,
    Responses,
    band,
    ches,
    first_order,
    head_kernel,
    ideal_range,
    regime,
    responses,
    token_kernel,
)
from simgrad.theory.closed_forms import learning_dynamics, unconstrained
from simgrad.theory.closed_forms import linear_softmax as linear
from simgrad.theory.kernel import jacobian
from simgrad.theory.kernel.gram import gradients
from simgrad.theory.mitigation import Calibrated, PairwiseNormalized
from simgrad.typing import Array, Float, Theta
from simgrad.validation.agreement import summed
from simgrad.validation.cells import regimes_of
from simgrad.validation.checks import Check, gap
from simgrad.validation.subjects import CONTEXT_TABLES, VOCAB, random_pairs

WIDTH = 12

Found = dict[str, tuple[Any, Any]]
"""By statement: what the closed form says, and what the oracle says."""


class _Case(NamedTuple):
    """A random model on random pairs: what closed forms read, and what the oracle says."""

    apply: ContextApply
    theta: Theta
    pairs: tuple[Pair, ...]
    batch: Batch
    result: Responses
    rows: Float[Array, "U n"]
    kernel: PairKernel

    @property
    def unembedding(self) -> Array:
        return self.theta["unembedding"]["table"]


def _case(apply: ContextApply, pairs: tuple[Pair, ...], theta: Theta) -> _Case:
    """Rows of the Jacobian are chosen 1, rejected 1, chosen 2, …; the kernel is theirs."""
    batch = padded(pairs)
    leaves = jax.tree.leaves(jacobian(apply, theta, batch))
    rows = jnp.concatenate([x.reshape(len(x), -1) for x in leaves], 1)
    kernel = gradients(rows.reshape(batch.size, 2, -1))
    return _Case(apply, theta, pairs, batch, responses(apply, theta, batch), rows, kernel)


def closed_forms(seed: int, device: str, limit: float = 1e-10) -> list[Check]:
    """Every closed form on random models and pairs in float64."""
    random, checks = np.random.default_rng(seed), []

    def check(model: str, part: Callable[..., Found], *arrays: Any) -> None:
        """Evaluate all of a part's statements as one program."""
        for name, both in jax.jit(part)(*arrays).items():
            error = gap(*both)
            checks.append(Check("closed forms", name, model, "float64", device, error, limit))

    def check_model(name: str, part: Callable[..., Found], pairs: Any, *more: Any) -> None:
        apply, theta = CONTEXT_TABLES[name](pairs, VOCAB, WIDTH, seed, "float64")
        check(name, lambda theta, *xs: part(_case(apply, pairs, theta), *xs), theta, *more)

    check_model("linear-softmax", _frozen_features, random_pairs(random, 6))
    check_model("linear-softmax", _one_token, _one_token_pairs(random, 6))
    free = random_pairs(random, 6), random.normal(size=2 * 6)
    check_model("unconstrained-features", _free_features, *free)
    check_model("unconstrained-features", _one_context, _one_token_pairs(random, 4))
    one = random_pairs(random, 1), random.normal(size=VOCAB)
    for name in CONTEXT_TABLES:
        check_model(name, _dynamics, *one)
    check("logits", _squeezing, random.normal(size=VOCAB))
    g = random.normal(size=(200, 2, 3)) * random.lognormal(size=(200, 2, 1))
    check("geometry", _geometry, g, random.lognormal(size=(200, 2)) * np.array([1.0, -1.0]))
    return checks


def _one_token_pairs(random: np.random.Generator, count: int) -> tuple[Pair, ...]:
    prompts = random.integers(0, VOCAB, (count, 2)).tolist()
    tokens = [random.choice(VOCAB, 2, replace=False).tolist() for _ in range(count)]
    return tuple(Pair(p, [w], [l]) for p, (w, l) in zip(prompts, tokens, strict=True))  # noqa: E741


def _tokens(pairs: tuple[Pair, ...]) -> Array:
    """Chosen and rejected tokens of one-token pairs."""
    return jnp.asarray([[p.chosen[0], p.rejected[0]] for p in pairs]).T


def _frozen_features(case: _Case) -> Found:
    """Frozen features, W trained, responses of several tokens."""
    at, total = (case.result, case.batch), summed(token_kernel(case.apply, case.theta, case.batch))
    return {
        "Σ⟨h,h'⟩⟨e−π,e'−π'⟩ is the unembedding's kernel": (head_kernel(*at), case.kernel),
        "prefix + contrast + suffix + cross": (linear.shared_parts(*at).total, case.kernel),
        "token kernel sums to the pair kernel": (total, case.kernel),
    }


def _one_token(case: _Case) -> Found:
    """Frozen features, W trained, responses of one token."""
    at = case.result.hidden[:, 0, 0], case.result.logits[:, 0, 0], *_tokens(case.pairs)
    closed, rise = linear.single_token_kernel(*at), linear.single_token_rise(*at)
    return {
        "one token: ‖h‖²(1−2π_w+‖π‖²), ‖h‖²(‖π‖²−π_w−π_l)": (closed, case.kernel),
        "one token cannot fall: ‖h‖²(1−π_w+π_l)": (rise, -case.kernel.gap),
    }


def _free_features(case: _Case, weights: Float[Array, " U"]) -> Found:
    """W and every state trained, responses of several tokens."""
    batch, hidden, w = case.batch, case.result.hidden, case.unembedding
    states = unconstrained.token_states(w, hidden, batch.targets, _contexts(case), batch.valid)
    every = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), states)
    own = jax.vmap(lambda s: unconstrained.contributions(w, s, every, weights).total.sum())(every)
    pushed = jnp.einsum("up,vp,v->u", case.rows, case.rows, weights, precision="highest")
    closed = unconstrained.unconstrained_kernel(w, case.result, batch)

    different = np.array([i for i, p in enumerate(case.pairs) if p.chosen[0] != p.rejected[0]])
    sides = [jax.tree.map(lambda x, s=s: x[different, s], states) for s in (0, 1)]
    first = [batch.targets[different, s, 0] for s in (0, 1)]
    rate = jax.vmap(lambda *x: unconstrained.different_first_tokens_rate(w, *x).total)

    # where every α is one, each token's error is one and the same unit vector
    unit = jnp.where(batch.valid[..., None], jax.nn.one_hot(0, VOCAB)[None, None, None], 0.0)
    (h_w, e_w), (h_l, e_l) = ((hidden[:, s], unit[:, s]) for s in (0, 1))
    gaps = linear.response_inner(h_w, e_w, h_l, e_l) - linear.response_inner(h_w, e_w, h_w, e_w)
    return {
        "kernel from states and errors, shared prefixes counted": (closed, case.kernel),
        "first tokens differ: norms + first + cross + own": (
            rate(*sides, *first),
            -case.kernel.gap[different],
        ),
        "many samples: Σ_i weight_i ⟨∇log π, g_i⟩": (own, pushed),
        "CHES is the head gap with every α one": (ches(case.result, batch), gaps),
    }


def _contexts(case: _Case) -> Array:
    """Context numbers of response tokens (pairs, 2, R), 0 where padded."""
    table = np.zeros(case.batch.targets.shape, np.int32)
    for i, pair in enumerate(case.pairs):
        for side, response in enumerate((pair.chosen, pair.rejected)):
            for k in range(len(response)):
                table[i, side, k] = case.apply.contexts.index((*pair.prompt, *response[:k]))
    return jnp.asarray(table)


def _one_context(case: _Case) -> Found:
    """One token after one context, W and h trained: who rises, and where the mass goes."""
    w, at = case.unembedding, (case.result.hidden[:, 0, 0], *_tokens(case.pairs))
    rates = jax.vmap(lambda *x: unconstrained.single_token_rate(w, *x).total)(*at)
    masses = jax.vmap(lambda *x: unconstrained.mass_rates(w, *x))(*at)
    scores = jax.vmap(lambda *x: unconstrained.mass_direction(w, *x))(*at[1:])
    moved = jnp.stack([_flow(case.apply, case.theta, pair) for pair in case.pairs])

    def others(x: Array) -> Array:
        """Of the tokens outside the pair, up to what is common to them."""
        outside = [np.delete(np.arange(VOCAB), [*p.chosen, *p.rejected]) for p in case.pairs]
        rest = jnp.take_along_axis(x, jnp.asarray(np.array(outside)), 1)
        return rest - rest.mean(1, keepdims=True)

    return {
        "one token: norms + state + alignment + others": (rates, -case.kernel.gap),
        "d/dt log π(z) of every token": (masses, moved),
        "mass goes along ⟨W_z, W₊−W₋⟩": (others(scores), others(moved)),
    }


def _flow(apply: ContextApply, theta: Theta, pair: Pair) -> Array:
    """d/dt log π(·) after the prompt under θ̇ = g_w - g_l, by automatic differentiation."""

    def logp(theta: Theta) -> Array:
        return jax.nn.log_softmax(apply(theta, jnp.asarray([pair.prompt])).logits[0, -1])

    step = jax.grad(lambda t: logp(t)[pair.chosen[0]] - logp(t)[pair.rejected[0]])(theta)
    return jax.jvp(logp, (theta,), (step,))[1]


def _dynamics(case: _Case, residual: Float[Array, " V"]) -> Found:
    """Δlog π(·|x_o) = −ηAKG and the logit kernels, after a prompt x_u and one token more."""
    policy, model, pair = (case.apply, case.theta), bind(case.apply, case.theta), case.pairs[0]
    seen, other = jnp.asarray(pair.prompt), jnp.asarray([*pair.prompt, pair.chosen[0]])

    def logits(t: Theta, tokens: Array) -> Array:
        return case.apply(model.whole(t), tokens[None]).logits[0, -1]

    step = jax.vjp(lambda t: logits(t, seen), model.trained)[1](residual)[0]
    fall = lambda t: -jax.nn.log_softmax(logits(t, other))  # noqa: E731
    exact = jax.jvp(fall, (model.trained,), (step,))[1]
    parts = learning_dynamics.decompose(*policy, other, seen, residual)
    h, elsewhere = (case.apply(case.theta, x[None]).hidden[0, -1] for x in (seen, other))
    between = learning_dynamics.linear_softmax_logit_kernel(elsewhere, h, VOCAB)
    closed = learning_dynamics.linear_softmax_logit_kernel(h, h, VOCAB)
    if not case.apply.trainable:  # the features too
        closed = learning_dynamics.unconstrained_logit_kernel(case.unembedding, h, h, True)
    own = learning_dynamics.logit_kernel(*policy, seen, seen)
    return {
        "Δlog π(·|x_o) = −ηAKG": (parts.change(), exact),
        "logit kernel ⟨h,h'⟩I, + WWᵀ where h is trained": (closed, own),
        "logit kernel between contexts ⟨h,h'⟩I": (between, parts.kernel),
    }


def _squeezing(z: Float[Array, " V"]) -> Found:
    """One step on the logits that pushes token 3 down."""
    pushed = z - 0.7 * (jax.nn.one_hot(3, VOCAB, dtype=z.dtype) - jax.nn.softmax(z))
    change = learning_dynamics.squeeze_step(z, jnp.asarray(3), 0.7).change
    exact = jax.nn.log_softmax(pushed) - jax.nn.log_softmax(z)
    return {"squeezing: Δlog π_z = η(π_z − [z=y] − τ)": (change, exact)}


def _geometry(g: Float[Array, "B 2 n"], force: Float[Array, "B 2"]) -> Found:
    """Regimes, bands and mitigations on random gradients."""
    kernel, step = gradients(g), jnp.einsum("bs,bsn->bn", force, g, precision="highest")
    signs = regimes_of(jnp.einsum("bsn,bn->bs", g, step, precision="highest"))
    ideal = signs == 0
    ratio, limits = -force[:, 0] / force[:, 1], ideal_range(kernel)
    between = (ratio >= limits.lower) & (ratio <= limits.upper)
    centred = band(kernel, Calibrated().changed(force, kernel))
    apart = jnp.broadcast_to(jnp.asarray([1.0, -1.0]), force.shape)
    normalised = first_order(kernel, PairwiseNormalized().changed(apart, kernel))
    closed = jnp.linalg.norm(g, axis=-1) * (1 - kernel.cosine)[:, None] * apart
    return {
        "regimes are the signs of both changes": (regime(first_order(kernel, force)), signs),
        "the band is the ideal regime": (band(kernel, force).inside, ideal),
        "the ideal range of d_w/d_l is the ideal regime": (between, ideal),
        "calibration moves r to r*": (centred.log_ratio, centred.centre),
        "pairwise-normalised: ±‖g‖(1−cos)": (normalised, closed),
    }
