"""Slow oracles in numpy float64, written from the definitions and sharing no code with the
library."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.jit, static_argnums=0)
def _forward(apply, theta, tokens):
    out = apply(theta, tokens)
    return out.logits[0], out.hidden[0]


@functools.partial(jax.jit, static_argnums=0)
def _gradient(apply, theta, tokens, start, end):
    """∇ Σ_{start <= k < end} log π(token k | before), as one loop over positions."""

    def logp(theta):
        logits = apply(theta, tokens).logits[0]
        total = jnp.zeros((), logits.dtype)
        for k in range(1, tokens.shape[1]):
            row = logits[k - 1]
            term = row[tokens[0, k]] - jax.scipy.special.logsumexp(row)
            total = total + jnp.where((k >= start) & (k < end), term, 0.0)
        return total

    return jax.grad(logp)(theta)


def sequence(apply, theta, prompt, response):
    """Token log-probs, logits and states that predict the response, and the state after it: one
    plain sequence."""
    logits, hidden = _forward(apply, theta, jnp.array([[*prompt, *response]]))
    logits, hidden = np.asarray(logits, np.float64), np.asarray(hidden, np.float64)
    start = len(prompt) - 1
    rows = range(start, start + len(response))
    logps = []
    for row, token in zip(rows, response, strict=True):
        shifted = logits[row] - logits[row].max()
        logps.append(shifted[token] - np.log(np.exp(shifted).sum()))
    return np.array(logps), logits[list(rows)], hidden[list(rows)], hidden[start + len(response)]


def gradient(apply, theta, prompt, response):
    """∇ log π(response | prompt) for every leaf, one plain sequence.

    What follows the response does not reach it in a causal model, so sequences end in zeros up to a
    common length and few programs are compiled; a context table has no such contexts.
    """
    tokens = [*prompt, *response]
    spare = 0 if hasattr(apply, "contexts") else -len(tokens) % 8
    return _gradient(apply, theta, jnp.array([tokens + [0] * spare]), len(prompt), len(tokens))


def dot(a, b, keep=lambda name: True):
    """Inner product of two gradients over the leaves whose path is kept."""
    total = 0.0
    for (path, x), (_, y) in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree_util.tree_leaves_with_path(b), strict=True
    ):
        name = "/".join(part.key for part in path)
        if keep(name):
            total += float(np.asarray(x, np.float64).ravel() @ np.asarray(y, np.float64).ravel())
    return total


def ches(states_w, states_l):
    """Double sums over states, as the definition is written."""
    cross = sum(float(h @ g) for h in states_w for g in states_l)
    own = sum(float(h @ g) for h in states_w for g in states_w)
    return cross - own, cross / (len(states_w) * len(states_l)) - own / len(states_w) ** 2


def head_gradient(logits, states, tokens):
    """∇_W log π as an explicit V x D matrix."""
    total = np.zeros((logits.shape[1], states.shape[1]))
    for row, state, token in zip(logits, states, tokens, strict=True):
        p = np.exp(row - row.max())
        p /= p.sum()
        total += np.outer(np.eye(len(p))[token] - p, state)
    return total


def edit_distance(a, b):
    """Levenshtein distance by the full table."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i, j] = min(
                table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (x != y)
            )
    return int(table[-1, -1])
