"""Closed forms of the theory against automatic differentiation, on the device at hand.

The oracle is the Jacobian of log-probs, one plain backward pass a response; each closed form reads
a forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simgrad.models import Apply, bind, linear_softmax, unconstrained_features
from simgrad.pairs import Pair, padded
from simgrad.theory import (
    PairKernel,
    Regime,
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
from simgrad.theory.mitigation import Calibrated, PairwiseNormalized
from simgrad.typing import Array, Theta
from simgrad.validation.checks import Check, gap
from simgrad.validation.subjects import VOCAB, random_pairs

WIDTH = 12


def closed_forms(seed: int, device: str, limit: float = 1e-10) -> list[Check]:
    """Every closed form on random models and pairs in float64."""
    random = np.random.default_rng(seed)
    found = [
        item
        for part in (_linear, _unconstrained, _one_context, _dynamics, _geometry)
        for item in part(random, seed)
    ]
    return [
        Check("closed forms", name, model, "float64", device, gap(*both), limit)
        for name, model, both in found
    ]


Both = tuple[Any, Any]
"""What the closed form says, and what the oracle says."""
Found = Iterator[tuple[str, str, Both]]


def _compiled(model: str, f: Callable[..., dict[str, Both]], *args: Any) -> Found:
    """Evaluate all of a part's statements as one program."""
    for name, both in jax.jit(f)(*args).items():
        yield name, model, both


def _rows(apply: Apply, theta: Theta, pairs: tuple[Pair, ...]) -> Array:
    """The Jacobian of all log-probs as a matrix with rows chosen 1, rejected 1, chosen 2, …."""
    leaves = jax.tree.leaves(jacobian(apply, theta, padded(pairs)))
    return jnp.concatenate([x.reshape(len(x), -1) for x in leaves], 1)


def _kernel(rows: Array) -> PairKernel:
    w, l = rows[0::2], rows[1::2]  # noqa: E741
    return PairKernel((w * w).sum(-1), (w * l).sum(-1), (l * l).sum(-1))


def _one_token(random: np.random.Generator, count: int) -> tuple[Pair, ...]:
    prompts = random.integers(0, VOCAB, (count, 2)).tolist()
    tokens = [random.choice(VOCAB, 2, replace=False).tolist() for _ in range(count)]
    return tuple(Pair(p, [w], [l]) for p, (w, l) in zip(prompts, tokens, strict=True))  # noqa: E741


def _linear(random: np.random.Generator, seed: int) -> Found:
    """Frozen features, W trained."""
    model, pairs, one = "linear-softmax", random_pairs(random, 6), _one_token(random, 6)

    apply, theta = linear_softmax(pairs, VOCAB, WIDTH, seed, "float64")

    def several(theta: Theta) -> dict[str, Both]:
        batch, kernel = padded(pairs), _kernel(_rows(apply, theta, pairs))
        result = responses(apply, theta, batch)
        tokens = token_kernel(apply, theta, batch).sum((2, 4))
        total = PairKernel(tokens[:, 0, 0], tokens[:, 0, 1], tokens[:, 1, 1])
        return {
            "Σ⟨h,h'⟩⟨e−π,e'−π'⟩ is the unembedding's kernel": (head_kernel(result, batch), kernel),
            "prefix + contrast + suffix + cross": (
                linear.shared_parts(result, batch).total,
                kernel,
            ),
            "token kernel sums to the pair kernel": (total, kernel),
        }

    yield from _compiled(model, several, theta)
    apply_one, theta = linear_softmax(one, VOCAB, WIDTH, seed, "float64")

    def single(theta: Theta) -> dict[str, Both]:
        result, kernel = (
            responses(apply_one, theta, padded(one)),
            _kernel(_rows(apply_one, theta, one)),
        )
        tokens = jnp.asarray([[p.chosen[0], p.rejected[0]] for p in one]).T
        at = (result.hidden[:, 0, 0], result.logits[:, 0, 0], tokens[0], tokens[1])
        return {
            "one token: ‖h‖²(1−2π_w+‖π‖²), ‖h‖²(‖π‖²−π_w−π_l)": (
                linear.single_token_kernel(*at),
                kernel,
            ),
            "one token cannot fall: ‖h‖²(1−π_w+π_l)": (linear.single_token_rise(*at), -kernel.gap),
        }

    yield from _compiled(model, single, theta)


def _unconstrained(random: np.random.Generator, seed: int) -> Found:
    """W and every state trained, responses of several tokens."""
    pairs = random_pairs(random, 6)
    apply, theta = unconstrained_features(pairs, VOCAB, WIDTH, seed, "float64")
    weights = jnp.asarray(random.normal(size=2 * len(pairs)))
    different = np.array([i for i, p in enumerate(pairs) if p.chosen[0] != p.rejected[0]])

    def several(theta: Theta) -> dict[str, Both]:
        batch, rows = padded(pairs), _rows(apply, theta, pairs)
        result, kernel, w = (
            responses(apply, theta, batch),
            _kernel(rows),
            theta["unembedding"]["table"],
        )
        every = unconstrained.token_states(
            w,
            *(
                x.reshape(-1, *x.shape[2:])
                for x in (result.hidden, batch.targets, _contexts(pairs), batch.valid)
            ),
        )
        own = jax.vmap(lambda s: unconstrained.contributions(w, s, every, weights).total.sum())(
            every
        )
        w_states, l_states = (
            jax.tree.map(lambda x, s=s: x[2 * different + s], every) for s in (0, 1)
        )
        first = batch.targets[different, :, 0]
        rates = jax.vmap(lambda *x: unconstrained.different_first_tokens_rate(w, *x).total)(
            w_states, l_states, first[:, 0], first[:, 1]
        )
        unit = jnp.where(
            batch.valid[..., None], jax.nn.one_hot(0, VOCAB, dtype=w.dtype)[None, None, None], 0.0
        )
        inner = [
            linear.response_inner(result.hidden[:, 0], unit[:, 0], result.hidden[:, s], unit[:, s])
            for s in (1, 0)
        ]
        return {
            "kernel from states and errors, shared prefixes counted": (
                unconstrained.unconstrained_kernel(w, result, batch),
                kernel,
            ),
            "first tokens differ: norms + first + cross + own": (rates, -kernel.gap[different]),
            "many samples: Σ_i weight_i ⟨∇log π, g_i⟩": (
                own,
                jnp.einsum("up,vp,v->u", rows, rows, weights, precision="highest"),
            ),
            "CHES is the head gap with every α one": (ches(result, batch), inner[0] - inner[1]),
        }

    yield from _compiled("unconstrained-features", several, theta)


def _contexts(pairs: tuple[Pair, ...]) -> Array:
    """Context numbers of response tokens (pairs, 2, R): equal numbers mean equal contexts."""
    longest = max(max(len(p.chosen), len(p.rejected)) for p in pairs)
    seen: dict[tuple[int, ...], int] = {}
    table = np.zeros((len(pairs), 2, longest), np.int32)
    for i, pair in enumerate(pairs):
        for side, response in enumerate((pair.chosen, pair.rejected)):
            for k in range(len(response)):
                table[i, side, k] = seen.setdefault((*pair.prompt, *response[:k]), len(seen))
    return jnp.asarray(table)


def _one_context(random: np.random.Generator, seed: int) -> Found:
    """One token after one context, W and h trained: who rises, and where the mass goes."""
    pairs = _one_token(random, 4)
    apply, theta = unconstrained_features(pairs, VOCAB, WIDTH, seed, "float64")
    tokens = jnp.asarray([[p.chosen[0], p.rejected[0]] for p in pairs]).T
    outside = np.array([np.delete(np.arange(VOCAB), [*p.chosen, *p.rejected]) for p in pairs])

    def several(theta: Theta) -> dict[str, Both]:
        w, kernel = theta["unembedding"]["table"], _kernel(_rows(apply, theta, pairs))
        hidden = responses(apply, theta, padded(pairs)).hidden[:, 0, 0]
        rates = jax.vmap(lambda h, p, m: unconstrained.single_token_rate(w, h, p, m).total)(
            hidden, *tokens
        )
        closed = jax.vmap(lambda h, p, m: unconstrained.mass_rates(w, h, p, m))(hidden, *tokens)
        scores = jax.vmap(lambda p, m: unconstrained.mass_direction(w, p, m))(*tokens)
        moved = jnp.stack([_flow(apply, theta, pair) for pair in pairs])
        others = [jnp.take_along_axis(x, jnp.asarray(outside), 1) for x in (scores, moved)]
        return {
            "one token: norms + state + alignment + others": (rates, -kernel.gap),
            "d/dt log π(z) of every token": (closed, moved),
            "mass goes along ⟨W_z, W₊−W₋⟩": tuple(x - x.mean(1, keepdims=True) for x in others),  # type: ignore[dict-item]
        }

    yield from _compiled("unconstrained-features", several, theta)


def _flow(apply: Apply, theta: Theta, pair: Pair) -> Array:
    """d/dt log π(·) after the prompt under θ̇ = g_w - g_l, by automatic differentiation."""

    def logp(theta: Theta) -> Array:
        return jax.nn.log_softmax(apply(theta, jnp.asarray([pair.prompt])).logits[0, -1])

    step = jax.grad(lambda t: logp(t)[pair.chosen[0]] - logp(t)[pair.rejected[0]])(theta)
    return jax.jvp(logp, (theta,), (step,))[1]


def _dynamics(random: np.random.Generator, seed: int) -> Found:
    """Δlog π(·|x_o) = −ηAKG, the logit kernels, and squeezing."""
    pair = random_pairs(random, 1)[0]
    seen, other = jnp.asarray(pair.prompt), jnp.asarray([*pair.prompt, pair.chosen[0]])
    residual, z = (jnp.asarray(random.normal(size=VOCAB)) for _ in range(2))

    def decomposed(apply: Apply, theta: Theta) -> dict[str, Both]:
        model = bind(apply, theta)

        def logits(t: Theta, tokens: Array) -> Array:
            return apply(model.whole(t), tokens[None]).logits[0, -1]

        step = jax.vjp(lambda t: logits(t, seen), model.trained)[1](residual)[0]
        fall = lambda t: -jax.nn.log_softmax(logits(t, other))  # noqa: E731
        exact = jax.jvp(fall, (model.trained,), (step,))[1]
        parts = learning_dynamics.decompose(apply, theta, other, seen, residual)
        h, elsewhere = (apply(theta, x[None]).hidden[0, -1] for x in (seen, other))
        own = learning_dynamics.logit_kernel(apply, theta, seen, seen)
        closed = learning_dynamics.linear_softmax_logit_kernel(h, h, VOCAB)
        if not apply.trainable:  # the features too
            closed = learning_dynamics.unconstrained_logit_kernel(
                theta["unembedding"]["table"], h, h, True
            )
        return {
            "Δlog π(·|x_o) = −ηAKG": (parts.change(), exact),
            "logit kernel ⟨h,h'⟩I, + WWᵀ where h is trained": (closed, own),
            "logit kernel between contexts ⟨h,h'⟩I": (
                learning_dynamics.linear_softmax_logit_kernel(elsewhere, h, VOCAB),
                parts.kernel,
            ),
        }

    for model, build in (
        ("linear-softmax", linear_softmax),
        ("unconstrained-features", unconstrained_features),
    ):
        apply, theta = build([pair], VOCAB, WIDTH, seed, "float64")
        yield from _compiled(model, functools.partial(decomposed, apply), theta)

    def squeezed(z: Array) -> dict[str, Both]:
        pushed = z - 0.7 * (jax.nn.one_hot(3, VOCAB, dtype=z.dtype) - jax.nn.softmax(z))
        change = learning_dynamics.squeeze_step(z, jnp.asarray(3), 0.7).change
        return {
            "squeezing: Δlog π_z = η(π_z − [z=y] − τ)": (
                change,
                jax.nn.log_softmax(pushed) - jax.nn.log_softmax(z),
            )
        }

    yield from _compiled("logits", squeezed, z)


def _geometry(random: np.random.Generator, seed: int) -> Found:
    """Regimes, bands and mitigations on random gradients."""
    g = jnp.asarray(random.normal(size=(2, 200, 3)) * random.lognormal(size=(2, 200, 1)))
    force = jnp.asarray(random.lognormal(size=(200, 2)) * np.array([1.0, -1.0]))

    def several(g: Array, force: Array) -> dict[str, Both]:
        kernel = PairKernel(*((g[a] * g[b]).sum(-1) for a, b in ((0, 0), (0, 1), (1, 1))))
        step = force[:, :1] * g[0] + force[:, 1:] * g[1]
        falls, rises = (g[0] * step).sum(-1) < 0, (g[1] * step).sum(-1) > 0
        ideal = ~falls & ~rises
        signs = jnp.where(
            falls,
            jnp.where(rises, int(Regime.REVERSED), int(Regime.BOTH_FALL)),
            jnp.where(rises, int(Regime.BOTH_RISE), int(Regime.IDEAL)),
        )
        ratio, limits = -force[:, 0] / force[:, 1], ideal_range(kernel)
        centred = band(kernel, Calibrated().changed(force, kernel))
        equal = jnp.broadcast_to(jnp.asarray([[1.0, -1.0]]), force.shape)
        normalised = first_order(kernel, PairwiseNormalized().changed(equal, kernel))
        norms = jnp.linalg.norm(g, axis=-1)
        return {
            "regimes are the signs of both changes": (regime(first_order(kernel, force)), signs),
            "the band is the ideal regime": (band(kernel, force).inside, ideal),
            "the ideal range of d_w/d_l is the ideal regime": (
                (ratio >= limits.lower) & (ratio <= limits.upper),
                ideal,
            ),
            "calibration moves r to r*": (centred.log_ratio, centred.centre),
            "pairwise-normalised: ±‖g‖(1−cos)": (
                normalised.T,
                norms * (1 - kernel.cosine)[None] * jnp.asarray([[1.0], [-1.0]]),
            ),
        }

    yield from _compiled("geometry", several, g, force)
