"""The token kernel: which token's gradient meets which.

With g_{w,i} = ∇ log π(y_w,i | x, y_w,<i) a response's gradient is the sum of its tokens' gradients,
so the token kernel's blocks sum to the pair kernel, and weights on tokens (masks) act on it
linearly.
"""

from __future__ import annotations

import functools
import itertools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from simgrad import tree
from simgrad.models import Apply, TappedApply, bind
from simgrad.pairs import Batch, one_by_one
from simgrad.theory.kernel.cost import Shapes
from simgrad.theory.kernel.gram import PairKernel
from simgrad.theory.kernel.rules import between_tokens
from simgrad.theory.kernel.signals import collect
from simgrad.typing import Array, Float, Int, Theta

TokenMethod = Literal["auto", "ghost", "columns"]


def token_kernel(
    apply: Apply, theta: Theta, batch: Batch, method: TokenMethod = "auto", memory: int = 2**31
) -> Float[Array, "B 2 R 2 R"]:
    """⟨∇log π(token i), ∇log π(token j)⟩ for all response tokens of each pair; 0 where padded.

    ``kernel[b, 0, i, 1, j]`` is ⟨g_{w,i}, g_{l,j}⟩, the token-by-token entanglement of Yuan et al.
    (arXiv 2410.13828, Sec. 4). Sums over i and j give :func:`simgrad.theory.pair_kernel`.

    Args:
        apply: the model; :func:`simgrad.models.only` selects parameters.
        theta: its parameters.
        batch: B pairs; ``ghost`` needs the padded layout.
        method: ``columns`` computes J (Jᵀ e_j) for one token after the other, with one gradient in
            memory at a time, for any model and layout. ``ghost`` is one backward pass for all
            tokens of a pair, layer by layer, and contractions over tokens, several times faster; it
            holds the signals of all tokens at one layer, or of as many as fit in ``memory``: with n
            parts, every two of them together, it costs about n - 1 times as much. ``auto`` takes
            it where it can and needs no more than 5 parts.
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
            return _ghost(apply, theta, batch, max(chunk, 1))
    elif method == "ghost":
        raise ValueError(
            "method 'ghost' needs a transformer and a padded batch (pairs.padded); use 'columns'"
        )
    b, _, r = batch.targets.shape
    side, index = (x.reshape(-1) for x in jnp.meshgrid(jnp.arange(2), jnp.arange(r), indexing="ij"))
    every = jnp.broadcast_to(jnp.stack([side, index], -1)[None], (b, 2 * r, 2))
    columns = token_columns(apply, theta, batch, every)
    return jnp.moveaxis(columns, 1, -1).reshape(b, 2, r, 2, r)


_PARTS = 5  # more take longer than columns do


def _chunk(apply: TappedApply, theta: Theta, batch: Batch, memory: int) -> int:
    """Tokens of each response in a part: all, or so many that two parts' signals fit in memory."""
    shapes, most = Shapes.of(apply, theta), batch.targets.shape[-1]
    _, sequences, length = batch.tokens.shape
    features = sum(r.fan_in + r.out for r in shapes.readings) + 2 * shapes.width
    # of one token: signals, and what is computed again for them
    token = 2 * sequences * length * features * shapes.itemsize
    return most if most * token <= memory else memory // token // 2


@functools.partial(jax.jit, static_argnames=("apply", "chunk"))
def _ghost(apply: TappedApply, theta: Theta, batch: Batch, chunk: int) -> Array:
    bind(apply, theta)  # raises where nothing is trained
    most = batch.targets.shape[-1]
    parts = [np.minimum(np.arange(k, k + chunk), most - 1) for k in range(0, most, chunk)]
    couples = jnp.asarray(
        [np.concatenate(two) for two in itertools.combinations(parts, 2)] or [np.arange(most)]
    )

    def one(pair: Batch) -> Array:
        def fill(kernel: Array, index: Array) -> tuple[Array, None]:
            blocks, _ = collect(apply, theta, pair, between_tokens, index)
            summed = [x.sum(0) if tree.is_layered(n) else x for n, x in blocks.items()]
            block = jnp.moveaxis(jnp.stack(summed).sum(0), (1, 3), (0, 1)).astype(kernel.dtype)
            return kernel.at[:, index[:, None], :, index[None, :]].set(block), None

        dtype = tree.accumulator(jax.tree.leaves(theta)[0].dtype)
        return jax.lax.scan(fill, jnp.zeros((2, most, 2, most), dtype), couples)[0]

    return one_by_one(one, batch)


def token_columns(
    apply: Apply, theta: Theta, batch: Batch, tokens: Int[Array, "B K 2"]
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
    >>> columns = token_columns(*linear_softmax(pairs, 9, 4), padded(pairs), jnp.array([[[0, 0]]]))
    >>> bool(columns[0, 0, 0, 0] == columns[0, 0, 1, 0])  # a shared first token moves both alike
    True
    """
    if not isinstance(tokens, Tracer):
        side, index = np.moveaxis(np.asarray(tokens), -1, 0)
        wrong = (side < 0) | (side > 1) | (index < 0) | (index >= batch.targets.shape[-1])
        if wrong.any():
            token = tuple(np.asarray(tokens)[wrong][0].tolist())
            raise ValueError(f"no token (side, index) = {token} in this batch")
    return _columns(apply, theta, batch, tokens)


@functools.partial(jax.jit, static_argnames="apply")
def _columns(apply: Apply, theta: Theta, batch: Batch, tokens: Array) -> Array:
    model = bind(apply, theta)

    def one(pair: Batch, wanted: Array) -> Array:
        def token_logp(trained: Theta) -> Array:
            return model.token_logp(trained, pair)[0]

        value, pullback = jax.vjp(token_logp, model.trained)
        _, push = jax.linearize(token_logp, model.trained)

        def column(token: Array) -> Array:
            (gradient,) = pullback(jnp.zeros_like(value).at[token[0], token[1]].set(1.0))
            return push(gradient)

        return jax.lax.map(column, wanted)

    return one_by_one(one, batch, tokens)


def masked_kernel(kernel: Float[Array, "B 2 R 2 R"], weights: Float[Array, "B 2 R"]) -> PairKernel:
    """Pair kernel when each token's log-prob has a weight: log π → Σ_k a_k log π(y_k | ..).

    ⟨g_w, g_l⟩ = Σ_{ij} a_{w,i} a_{l,j} ⟨g_{w,i}, g_{l,j}⟩ and likewise the norms. It describes the
    masked log-probs, which training then moves; what happens to the whole responses, tokens of
    weight zero included, is :func:`masked_change`.

    >>> import jax.numpy as jnp
    >>> weights = jnp.array([[[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]])
    >>> masked_kernel(jnp.ones((1, 2, 3, 2, 3)), weights).inner.item()
    3.0
    """
    both = jnp.einsum("bsi,bsitj,btj->bst", weights, kernel, weights, precision="highest")
    return PairKernel(both[:, 0, 0], both[:, 0, 1], both[:, 1, 1])


def masked_change(
    kernel: Float[Array, "B 2 R 2 R"], weights: Float[Array, "B 2 R"], force: Float[Array, "B 2"]
) -> Float[Array, "B 2"]:
    """First-order Δlog π of whole responses per unit learning rate, when masked ones are trained.

        Δlog π_s = η Σ_i Σ_t c_t Σ_j a_{t,j} ⟨g_{s,i}, g_{t,j}⟩,        c = (d_w, -d_l)

    with i over all tokens of response s. A pair that :func:`masked_kernel` calls ideal can still
    lose its chosen response through tokens whose weight is zero. The force is the objective's at
    the masked log-probs.

    >>> import jax.numpy as jnp
    >>> only_rejected, force = jnp.array([[[0.0], [1.0]]]), jnp.array([[1.0, -1.0]])
    >>> masked_change(jnp.ones((1, 2, 1, 2, 1)), only_rejected, force).tolist()
    [[-1.0, -1.0]]
    """
    return jnp.einsum("bsitj,bt,btj->bs", kernel, force, weights, precision="highest")


@functools.partial(jax.jit, static_argnames="apply")
def token_changes(
    apply: Apply, theta: Theta, batch: Batch, force: Float[Array, "B 2"]
) -> Float[Array, "B 2 R"]:
    """First-order Δlog π of every response token after one SGD step on its own pair; 0 if padded.

        Δlog π(y_{s,i} | x, y_{s,<i}) = η (d_w ⟨g_{s,i}, g_w⟩ - d_l ⟨g_{s,i}, g_l⟩) + O(η²)

    per unit learning rate: :func:`token_kernel` contracted with the force, without forming it (one
    backward and one forward derivative a pair, one gradient in memory). Sums over i are
    :func:`simgrad.theory.first_order`.

    >>> import jax.numpy as jnp
    >>> from simgrad.models import linear_softmax
    >>> from simgrad.pairs import Pair, padded
    >>> pairs, force = [Pair([1, 2], [3, 5], [3, 6])], jnp.array([[1.0, -1.0]])
    >>> changes = token_changes(*linear_softmax(pairs, 9, 4), padded(pairs), force)
    >>> bool(changes[0, 0, 0] == changes[0, 1, 0])  # a shared first token moves alike in both
    True
    """
    model = bind(apply, theta)

    def one(pair: Batch, c: Array) -> Array:
        def token_logp(trained: Theta) -> Array:
            return model.token_logp(trained, pair)[0]

        value, pullback = jax.vjp(token_logp, model.trained)
        each = jnp.where(pair.valid[0], c.astype(value.dtype)[:, None], 0.0)
        (step,) = pullback(each.astype(value.dtype))
        return jax.jvp(token_logp, (model.trained,), (step,))[1]

    return one_by_one(one, batch, force)
