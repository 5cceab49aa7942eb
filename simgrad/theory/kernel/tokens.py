"""The token kernel: which token's gradient pulls on which.

With g_{w,i} = ∇ log π(y_w,i | x, y_w,<i) a response's gradient is the sum of its tokens' gradients,
so the token kernel's blocks sum to the pair kernel, and weights on tokens (masks) act on it
linearly.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from simgrad import tree
from simgrad.models import Apply, TappedApply
from simgrad.models.likelihood import responses
from simgrad.objectives import Coefficients
from simgrad.pairs import Batch
from simgrad.theory.kernel.cost import Shapes
from simgrad.theory.kernel.ghost_tokens import ghost_tokens
from simgrad.theory.kernel.gram import PairKernel
from simgrad.theory.prediction.changes import Change
from simgrad.typing import Array, Float, Int, Theta

__all__ = ["masked_change", "masked_kernel", "token_changes", "token_columns", "token_kernel"]

TokenMethod = Literal["auto", "ghost", "columns"]


def token_kernel(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    include: Sequence[str] | None = None,
    method: TokenMethod = "auto",
    memory: int = 2**31,
) -> Float[Array, "B 2 R 2 R"]:
    """⟨∇log π(token i), ∇log π(token j)⟩ for all response tokens of each pair; 0 where padded.

    ``kernel[b, 0, i, 1, j]`` is ⟨g_{w,i}, g_{l,j}⟩, the token-by-token entanglement of Yuan et al.
    (arXiv 2410.13828, Sec. 4). Sums over i and j give :func:`simgrad.theory.pair_kernel`.

    Args:
        apply: the model.
        theta: its parameters.
        batch: B pairs; ``ghost`` needs the padded layout.
        include: patterns of parameter paths, see :func:`simgrad.theory.pair_kernel`.
        method: ``columns`` computes J (Jᵀ e_j) for one token after the other, with one gradient in
            memory at a time, for any model and layout. ``ghost`` is one backward pass for all
            tokens of a pair, layer by layer, and contractions over tokens, several times faster; it
            holds the signals of all tokens at one layer, or of as many as fit in ``memory``: with n
            parts, every two of them together, it costs about n - 1 times as much. ``auto`` takes it
            where it can and needs no more than 5 parts.
        memory: bytes for signals (2 GiB).

    Raises:
        ValueError: ``ghost`` for a packed batch or a model that is not a transformer.

    >>> from simgrad.models import ModelConfig, create
    >>> from simgrad.pairs import Pair, padded
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> token_kernel(apply, theta, padded([Pair([1, 2], [3], [4, 5])])).shape
    (1, 2, 2, 2, 2)
    """
    if method not in get_args(TokenMethod):
        raise ValueError(f"method={method!r}: choose one of {', '.join(get_args(TokenMethod))}")
    if isinstance(apply, TappedApply) and not batch.is_packed:
        chunk, most = _chunk(apply, theta, batch, memory), batch.targets.shape[-1]
        if method == "ghost" or (method == "auto" and chunk * _PARTS >= most):
            return _ghost(apply, theta, batch, tree.patterns(include), max(chunk, 1))
    elif method == "ghost":
        raise ValueError(
            "method 'ghost' needs a transformer and a padded batch (pairs.padded); use 'columns'"
        )
    b, _, r = batch.targets.shape
    side, index = (x.reshape(-1) for x in jnp.meshgrid(jnp.arange(2), jnp.arange(r), indexing="ij"))
    every = jnp.broadcast_to(jnp.stack([side, index], -1)[None], (b, 2 * r, 2))
    return jnp.moveaxis(token_columns(apply, theta, batch, every, include), 1, -1).reshape(
        b, 2, r, 2, r
    )


_PARTS = 5  # more take longer than columns do


def _chunk(apply: TappedApply, theta: Theta, batch: Batch, memory: int) -> int:
    """Tokens of each response in one part: all, or so many that the signals of two parts fit in ``memory``."""
    shapes, (_, sequences, length), most = (
        Shapes.of(apply, theta),
        batch.tokens.shape,
        batch.targets.shape[-1],
    )
    features = sum(r.fan_in + r.out for r in shapes.readings) + 2 * shapes.width
    token = (
        2 * sequences * length * features * shapes.itemsize
    )  # signals, and what is computed again for them
    return most if most * token <= memory else memory // token // 2


@functools.partial(jax.jit, static_argnames=("apply", "include", "chunk"))
def _ghost(
    apply: TappedApply, theta: Theta, batch: Batch, include: tuple[str, ...] | None, chunk: int
) -> Array:
    tree.partition(theta, include, apply.frozen)  # raises where the selection is empty
    most = batch.targets.shape[-1]
    parts = [np.minimum(np.arange(k, k + chunk), most - 1) for k in range(0, most, chunk)]
    couples = jnp.asarray(
        [np.concatenate(two) for two in itertools.combinations(parts, 2)] or [np.arange(most)]
    )

    def one(pair: Batch) -> Array:
        single = jax.tree.map(lambda x: x[None], pair)

        def fill(kernel: Array, index: Array) -> tuple[Array, None]:
            some = ghost_tokens(apply, theta, single, index, include)
            block = jnp.moveaxis(some, (1, 3), (0, 1))
            return kernel.at[:, index[:, None], :, index[None, :]].set(
                block.astype(kernel.dtype)
            ), None

        empty = jnp.zeros((2, most, 2, most), tree.accumulator(theta["embedding"]["table"].dtype))
        return jax.lax.scan(fill, empty, couples)[0]

    return jax.lax.map(one, batch)


def token_columns(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    tokens: Int[Array, "B K 2"],
    include: Sequence[str] | None = None,
) -> Float[Array, "B K 2 R"]:
    """Columns of :func:`token_kernel` for the named tokens only: ``tokens[b, k]`` is (side, index).

    Side 0 is the chosen response, 1 the rejected. ``result[b, k, s, i]`` = ⟨g_{s,i},
    g_{side,index}⟩, computed as J (Jᵀ e): one backward and one forward derivative each.

    Raises:
        ValueError: a token that its response does not have.

    >>> import jax.numpy as jnp
    >>> from simgrad.models import linear_softmax
    >>> from simgrad.pairs import Pair, padded
    >>> pairs = [Pair([1, 2], [3, 5], [3, 6])]
    >>> shared = token_columns(*linear_softmax(pairs, 9, 4), padded(pairs), jnp.array([[[0, 0]]]))[0, 0, :, 0]
    >>> bool(shared[0] == shared[1])  # a shared first token pulls on both responses alike
    True
    """
    if not isinstance(tokens, Tracer):
        side, index = np.moveaxis(np.asarray(tokens), -1, 0)
        longest = np.asarray(batch.targets.shape[-1])
        wrong = (side < 0) | (side > 1) | (index < 0) | (index >= longest)
        if wrong.any():
            raise ValueError(
                f"no token (side, index) = {tuple(np.asarray(tokens)[wrong][0].tolist())} in this "
                "batch"
            )
    return _columns(apply, theta, batch, tokens, tree.patterns(include))


@functools.partial(jax.jit, static_argnames=("apply", "include"))
def _columns(
    apply: Apply, theta: Theta, batch: Batch, tokens: Array, include: tuple[str, ...] | None
) -> Array:
    trained, rest = tree.partition(theta, include, apply.frozen)

    def one(item: tuple[Batch, Array]) -> Array:
        pair, wanted = item
        single = jax.tree.map(lambda x: x[None], pair)

        def token_logp(trained: Theta) -> Array:
            return responses(apply, tree.combine(trained, rest), single).token_logp[0]

        value, pullback = jax.vjp(token_logp, trained)
        _, push = jax.linearize(token_logp, trained)

        def column(token: Array) -> Array:
            (gradient,) = pullback(jnp.zeros_like(value).at[token[0], token[1]].set(1.0))
            return push(gradient)

        return jax.lax.map(column, wanted)

    return jax.lax.map(one, (batch, tokens))


def masked_kernel(kernel: Float[Array, "B 2 R 2 R"], weights: Float[Array, "B 2 R"]) -> PairKernel:
    """Pair kernel when each token's log-prob counts with a weight: log π → Σ_k a_k log π(y_k | ..).

    ⟨g_w, g_l⟩ = Σ_{ij} a_{w,i} a_{l,j} ⟨g_{w,i}, g_{l,j}⟩ and likewise the norms. It describes the
    masked log-probs, which training then moves; what happens to the whole responses, tokens of
    weight zero included, is :func:`masked_change`.

    >>> import jax.numpy as jnp
    >>> masked_kernel(jnp.ones((1, 2, 3, 2, 3)), jnp.array([[[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]])).inner.item()
    3.0
    """
    both = jnp.einsum("bsi,bsitj,btj->bst", weights, kernel, weights, precision="highest")
    return PairKernel(both[:, 0, 0], both[:, 0, 1], both[:, 1, 1])


def masked_change(
    kernel: Float[Array, "B 2 R 2 R"], weights: Float[Array, "B 2 R"], coefficients: Coefficients
) -> Change:
    """First-order Δlog π of the whole responses per unit learning rate, when masked log-probs are trained.

        Δlog π_s = η Σ_i Σ_j (d_w a_{w,j} ⟨g_{s,i}, g_{w,j}⟩ - d_l a_{l,j} ⟨g_{s,i}, g_{l,j}⟩)

    with i over all tokens of response s. A pair that :func:`masked_kernel` calls ideal can still
    lose its chosen response through tokens whose weight is zero. d_w, d_l are those of the
    objective at the masked log-probs.

    >>> import jax.numpy as jnp
    >>> one, only_rejected = jnp.ones(1), jnp.array([[[0.0], [1.0]]])
    >>> masked_change(jnp.ones((1, 2, 1, 2, 1)), only_rejected, Coefficients(one, one)).chosen.item()
    -1.0
    """
    signs = jnp.stack([coefficients.chosen, -coefficients.rejected], -1)
    change = jnp.einsum("bsitj,bt,btj->bs", kernel, signs, weights, precision="highest")
    return Change(change[:, 0], change[:, 1])


def token_changes(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    coefficients: Coefficients,
    include: Sequence[str] | None = None,
) -> Float[Array, "B 2 R"]:
    """First-order Δlog π of every response token after one SGD step on its own pair; 0 where padded.

        Δlog π(y_{s,i} | x, y_{s,<i}) = η (d_w ⟨g_{s,i}, g_w⟩ - d_l ⟨g_{s,i}, g_l⟩) + O(η²)

    per unit learning rate: :func:`token_kernel` contracted with the signed coefficients, without
    forming it (one backward and one forward derivative a pair, one gradient in memory). Sums over i
    are
    :func:`simgrad.theory.first_order`.

    >>> import jax.numpy as jnp
    >>> from simgrad.models import linear_softmax
    >>> from simgrad.pairs import Pair, padded
    >>> pairs, one = [Pair([1, 2], [3, 5], [3, 6])], jnp.ones(1)
    >>> changes = token_changes(*linear_softmax(pairs, 9, 4), padded(pairs), Coefficients(one, one))
    >>> bool(changes[0, 0, 0] == changes[0, 1, 0])  # a shared first token moves alike in both responses
    True
    """
    return _changes(apply, theta, batch, coefficients, tree.patterns(include))


@functools.partial(jax.jit, static_argnames=("apply", "include"))
def _changes(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    coefficients: Coefficients,
    include: tuple[str, ...] | None,
) -> Array:
    trained, rest = tree.partition(theta, include, apply.frozen)

    def one(item: tuple[Batch, Coefficients]) -> Array:
        pair, d = item
        single = jax.tree.map(lambda x: x[None], pair)

        def token_logp(trained: Theta) -> Array:
            return responses(apply, tree.combine(trained, rest), single).token_logp[0]

        value, pullback = jax.vjp(token_logp, trained)
        pull = jnp.stack([d.chosen, -d.rejected]).astype(value.dtype)[:, None]
        (step,) = pullback(jnp.where(single.valid[0], pull, jnp.zeros((), value.dtype)))
        return jax.jvp(token_logp, (trained,), (step,))[1]

    return jax.lax.map(one, (batch, coefficients))
