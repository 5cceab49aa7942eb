"""Settings that several theorems share, and slow oracles for them in numpy, written from the
definitions.

Unconstrained features: parameters {"w": unembedding, "h": one state a context}; a response is
(contexts, tokens). Linear softmax: ``w @ h`` with w alone trained. Geometry: pairs of plain
vectors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import reference

from simgrad.pairs import Pair
from simgrad.theory import PairKernel
from simgrad.theory.closed_forms.unconstrained import token_states

WIDTH, TOKENS, CONTEXTS = 5, 8, 12
BETA, REFERENCE_MARGIN = 0.3, 0.7

# responses as (contexts, tokens); the contexts of a pair coincide as far as its tokens do
DIFFERENT_FIRST = ((0, 1, 2), (3, 4, 1)), ((0, 3), (5, 4))
SHARED_PREFIX = ((0, 1, 2, 4), (3, 4, 1, 7)), ((0, 1, 3), (3, 5, 7))
ONE_BEGINS_THE_OTHER = ((0, 1), (3, 4)), ((0, 1, 2), (3, 4, 6))
OTHER_PROMPT = ((7, 8), (3, 1)), ((7, 9, 10), (2, 2, 0))
SINGLE = ((0,), (3,)), ((0,), (5,))
ALL = [DIFFERENT_FIRST, SHARED_PREFIX, ONE_BEGINS_THE_OTHER, OTHER_PROMPT, SINGLE]


def softmax(z):
    p = np.exp(z - z.max())
    return p / p.sum()


def slope(sizes, errors):
    """Order of the errors in the sizes: the slope of a line in logarithms, for each column."""
    return np.polyfit(np.log(sizes), np.log(np.asarray(errors)), 1)[0]


def parameters(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(scale * rng.normal(size=(TOKENS, WIDTH))),
        "h": jnp.asarray(rng.normal(size=(CONTEXTS, WIDTH))),
    }


def log_prob(theta, contexts, tokens):
    """log π of a response, as one loop over its tokens."""
    total = 0.0
    for s, y in zip(contexts, tokens, strict=True):
        total = total + jax.nn.log_softmax(theta["w"] @ theta["h"][s])[y]
    return total


def gradient(theta, contexts, tokens):
    """∇ log π of a response: e h^T in W and W^T e in the token's state, one token after the
    other."""
    w, h = (np.asarray(theta[name]) for name in "wh")
    total = {"w": np.zeros_like(w), "h": np.zeros_like(h)}
    for s, y in zip(contexts, tokens, strict=True):
        error = np.eye(len(w))[y] - softmax(w @ h[s])
        total["w"] += np.outer(error, h[s])
        total["h"][s] += w.T @ error
    return total


def dot(a, b, keep=("w", "h")):
    return reference.dot(a, b, lambda name: name in keep)


def dpo_loss(theta, chosen, rejected):
    """DPO on one pair against a reference margin."""
    return -jax.nn.log_sigmoid(
        BETA * (log_prob(theta, *chosen) - log_prob(theta, *rejected) - REFERENCE_MARGIN)
    )


def minus_dpo_gradient(theta, chosen, rejected):
    """-∇L of :func:`dpo_loss`, c (∇ log π⁺ - ∇ log π⁻), and c = β σ(-β m)."""
    w, h = (np.asarray(theta[name]) for name in "wh")
    plus, minus = (
        sum(np.log(softmax(w @ h[s]))[y] for s, y in zip(*r, strict=True))
        for r in (chosen, rejected)
    )
    c = BETA / (1 + np.exp(BETA * (plus - minus - REFERENCE_MARGIN)))
    return jax.tree.map(
        lambda a, b: c * (a - b), gradient(theta, *chosen), gradient(theta, *rejected)
    ), c


jitted_token_states = jax.jit(token_states)


def states(theta, contexts, tokens, length=5):
    """What the library is given of a response: TokenStates, right-padded with NaN."""
    valid = np.arange(length) < len(tokens)
    contexts, tokens = (np.array([*x, *[0] * (length - len(x))]) for x in (contexts, tokens))
    hidden = np.where(valid[:, None], np.asarray(theta["h"])[contexts], np.nan)
    return jitted_token_states(
        theta["w"], *(jnp.asarray(x) for x in (hidden, tokens, contexts, valid))
    )


def index(*tokens):
    return [jnp.asarray(t) for t in tokens]


SHARED = [
    Pair([1, 2], [5, 6, 7, 3, 4, 0], [5, 6, 8, 3, 4, 0]),  # prefix and suffix around one token
    Pair([3], [7, 5, 5, 0], [8, 5, 5, 0]),  # suffix only
    Pair([4, 1], [2, 9, 6], [2, 9, 10]),  # prefix only, the last token differs
    Pair([6], [7], [9]),  # one token
    Pair([2], [5, 5, 5], [5, 5]),  # one response begins the other
    Pair([8], [1, 2, 3, 4], [5, 6]),  # nothing shared
]


@jax.jit
def _unembedding_gradient(w, h, y):
    return jax.grad(lambda w: jax.nn.log_softmax(w @ h)[y])(w)


def unembedding_gradient(w, h, y):
    """∇_W log π(y|φ) of a linear softmax, by autodiff."""
    return np.asarray(_unembedding_gradient(w, h, y))


def pair_of(g_w, g_l):
    """The kernel of two gradients that are there as vectors."""
    return PairKernel(
        *(jnp.asarray((a * b).sum(-1)) for a, b in ((g_w, g_w), (g_w, g_l), (g_l, g_l)))
    )


def geometry(rng, n=2000):
    """Kernels of actual vectors in three dimensions, so that Cauchy-Schwarz holds, and the
    vectors."""
    w, l = rng.normal(size=(2, n, 3)) * rng.lognormal(size=(2, n, 1))  # noqa: E741
    return pair_of(w, l), w, l


def kernel_of_rows(logp, theta):
    """The three numbers of each pair's kernel from explicit Jacobian rows of ``logp(theta)``, (B,
    2)."""
    rows = jax.jacrev(logp)(theta)
    flat = [np.asarray(x).reshape(*x.shape[:2], -1) for x in jax.tree.leaves(rows)]
    g = np.concatenate(flat, -1)
    which = {"sq_chosen": (0, 0), "inner": (0, 1), "sq_rejected": (1, 1)}
    return {name: (g[:, x] * g[:, y]).sum(-1) for name, (x, y) in which.items()}
