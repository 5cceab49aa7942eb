"""The entanglement kernel of a whole data set, in bounded memory.

The responses of B pairs in one row, u = (log π_w^1, log π_l^1, log π_w^2, …) ∈ R^{2B}, have the
Jacobian J = ∂u/∂θ and the kernel K = J J^T, an empirical neural tangent kernel of sequence
log-probs. An optimizer that scales coordinates by P sees K_P = J P J^T
(:mod:`simgrad.theory.kernel.preconditioning`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from simgrad import tree
from simgrad.models import Apply, bind
from simgrad.pairs import Batch, chunks, one_by_one
from simgrad.typing import Array, Float, Theta

MEMORY = 2**30
"""Default bound on the bytes of Jacobian rows held at once: 1 GiB."""


@dataclass(frozen=True)
class KernelPlan:
    """How a kernel is computed within a memory bound.

    Attributes:
        chunk: most pairs whose gradients are held at once on each of the two sides of a block.
        bytes: held by Jacobian rows at the peak (two chunks, two responses a pair). On top come one
            pair's activations and gradients, working copies of the rows of one parameter leaf, and
            the result.
        gradients: response gradients taken in all; 2 B when everything fits at once.
    """

    chunk: int
    bytes: int
    gradients: int


def kernel_plan(
    apply: Apply, theta: Theta, pairs: int, others: int | None = None, memory: int = MEMORY
) -> KernelPlan:
    """Largest chunk whose Jacobian rows fit in ``memory`` bytes, and what it costs.

    ``others`` counts the pairs on the kernel's second side; None is the symmetric kernel, which
    needs one copy only when all its rows fit, and half of the blocks when they do not.

    >>> from simgrad.models import ModelConfig, create
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> plan = kernel_plan(apply, theta, pairs=10, memory=2**18)
    >>> plan.chunk, plan.bytes, plan.gradients  # 5,032 parameters of 4 bytes; 4 + 6 blocks of rows
    (3, 241536, 60)

    Raises:
        ValueError: not even one pair at a time fits.
    """
    leaves = jax.tree.leaves(bind(apply, theta).trained)
    pair = 2 * sum(x.size * tree.accumulator(x.dtype).itemsize for x in leaves)
    if others is None and pair * pairs <= memory:
        return KernelPlan(pairs, pair * pairs, 2 * pairs)
    if 2 * pair > memory:
        raise ValueError(
            f"memory={memory:,} bytes is too little: the gradients of two pairs take {2 * pair:,}; "
            "raise it, or select fewer parameters with simgrad.models.only"
        )
    chunk = memory // (2 * pair)
    if others is None:
        rows, chunk = chunks(pairs, chunk).shape
        return KernelPlan(chunk, 2 * chunk * pair, chunk * rows * (rows + 1))
    (rows, left), (columns, right) = chunks(pairs, chunk).shape, chunks(others, chunk).shape
    return KernelPlan(max(left, right), (left + right) * pair, 2 * rows * (left + columns * right))


@functools.partial(jax.jit, static_argnames="apply")
def jacobian(apply: Apply, theta: Theta, batch: Batch) -> Theta:
    """J: for every trained leaf its gradients, one row a response (chosen 1, rejected 1, …).

    Leaves have shape (2 B, *leaf) in float32 or better; leaves that are not trained are None.

    >>> from simgrad.models import ModelConfig, create
    >>> from simgrad.pairs import Pair, padded
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> jacobian(apply, theta, padded([Pair([1, 2], [3], [4, 5])]))["unembedding"]["table"].shape
    (2, 9, 8)
    """
    model = bind(apply, theta)

    def one(pair: Batch) -> Theta:
        value, pullback = jax.vjp(lambda t: model.logp(t, pair)[0], model.trained)
        rows = tree.pulled_back(pullback, jnp.eye(2, dtype=value.dtype))
        return jax.tree.map(tree.widen, rows)

    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), one_by_one(one, batch))


def entanglement_kernel(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    other: Batch | None = None,
    scale: Theta | None = None,
    memory: int = MEMORY,
) -> Float[Array, "U others"]:
    """K = J P J'^T between the responses of ``batch`` and those of ``other`` (default: itself).

    Rows and columns run over chosen 1, rejected 1, chosen 2, …; unit nats² per unit of θ² (times
    the unit of P). A run on ``batch`` moves any response z of ``other`` by η Σ_j K(z, j) c_j to
    first order, so probes (a paraphrase, a harmful answer) go into ``other``. Driven from Python,
    chunk by chunk.

    Args:
        apply: the model; :func:`simgrad.models.only` selects parameters.
        theta: its parameters.
        batch: B pairs.
        other: further pairs; their shapes may differ.
        scale: the diagonal of P for every trained leaf, for example ``preconditioner.scale``.
        memory: bound on the bytes of Jacobian rows held at once, see :func:`kernel_plan`.

    Raises:
        ValueError: not even one pair's gradients fit in ``memory``.

    Source: the gradient inner products of Yuan et al. (arXiv 2410.13828), for all pairs of
    responses.

    >>> from simgrad.models import ModelConfig, create
    >>> from simgrad.pairs import Pair, padded
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> batch = padded([Pair([1, 2], [3], [4, 5]), Pair([1], [6], [7])])
    >>> entanglement_kernel(apply, theta, batch).shape
    (4, 4)
    """
    blocks = entanglement_blocks(apply, theta, batch, other, scale, memory)
    return jnp.stack([x.sum(-1) if x.ndim == 3 else x for x in blocks.values()]).sum(0)


def entanglement_blocks(
    apply: Apply,
    theta: Theta,
    batch: Batch,
    other: Batch | None = None,
    scale: Theta | None = None,
    memory: int = MEMORY,
) -> dict[str, Float[Array, "U others *depth"]]:
    """:func:`entanglement_kernel` of each parameter leaf by path.

    Leaves under ``layers/`` have depth as last axis. The blocks sum to the whole kernel;
    :func:`simgrad.theory.kernel.by_layer` and :func:`simgrad.theory.kernel.by_matrix` group them.

    Raises:
        ValueError: as :func:`entanglement_kernel`; a ``scale`` that is no tree of the trained
            parameters.

    >>> from simgrad.models import unconstrained_features
    >>> from simgrad.pairs import Pair, padded
    >>> pairs = [Pair([1], [3], [4]), Pair([2], [3], [4])]
    >>> apply, theta = unconstrained_features(pairs, 9, 4)
    >>> blocks = entanglement_blocks(apply, theta, padded(pairs))
    >>> bool((blocks["features/table"][:2, 2:] == 0).all())  # only W entangles the pairs
    True
    """
    across, others = (batch, None) if other is None else (other, other.size)
    chunk = kernel_plan(apply, theta, batch.size, others, memory).chunk
    like = jax.tree.structure(bind(apply, theta).trained)
    if scale is not None and jax.tree.structure(scale) != like:
        raise ValueError(
            "scale must be a tree like the trained parameters, such as the scale of a "
            "Preconditioner"
        )
    rows: list[list[dict[str, np.ndarray]]] = []
    for left in chunks(batch.size, chunk):
        a = jacobian(apply, theta, batch.take(left))
        row = []
        for right in chunks(across.size, chunk):
            if other is None and right[0] > left[0]:
                break
            same = other is None and right[0] == left[0]
            b = a if same else jacobian(apply, theta, across.take(right))
            row.append({name: np.asarray(x) for name, x in _products(a, b, scale).items()})
            del b  # two chunks are held at once, not three
        rows.append(row)
        del a
    if other is None:
        rows = _mirrored(rows)
    n, m = 2 * batch.size, 2 * across.size

    def whole(name: str) -> Array:
        lines = [np.concatenate([block[name] for block in row], 1) for row in rows]
        # the last chunk repeats its final pair
        return jnp.asarray(np.concatenate(lines)[:n, :m])

    return {name: whole(name) for name in rows[0][0]}


def pair_pushes(
    kernel: Float[Array, "followed U"], force: Float[Array, "B 2"], share: float | None = None
) -> Float[Array, "followed B"]:
    """Which pair moves which response: each pair's part of the first-order Δlog π.

        push(z, j) = s (d_w^j K(z, w_j) - d_l^j K(z, l_j)),        Δlog π(z) = η Σ_j push(z, j)

    in nats per unit learning rate.

    ``kernel`` is :func:`entanglement_kernel` of the followed responses (rows) against the pairs
    (columns), with the optimizer's ``scale``; ``share`` is s, 1/B of a mean loss unless given.

    Raises:
        ValueError: a kernel with other than two columns a pair.

    >>> import jax.numpy as jnp
    >>> force = jnp.array([[1.0, -1.0], [1.0, -1.0]])
    >>> pair_pushes(jnp.array([[4.0, 1.0, -2.0, 2.0]]), force).tolist()  # one up, one down
    [[1.5, -2.0]]
    """
    b = len(force)
    if kernel.shape[-1] != 2 * b:
        raise ValueError(f"kernel has {kernel.shape[-1]} columns, but {b} pairs need {2 * b}")
    each = (kernel.reshape(-1, b, 2) * force[None]).sum(-1)
    return each * (1 / b if share is None else share)


def _mirrored(rows: list[list[dict[str, np.ndarray]]]) -> list[list[dict[str, np.ndarray]]]:
    def block(i: int, j: int) -> dict[str, np.ndarray]:
        if j <= i:
            return rows[i][j]
        return {name: x.swapaxes(0, 1) for name, x in rows[j][i].items()}

    return [[block(i, j) for j in range(len(rows))] for i in range(len(rows))]


def _products(a: Theta, b: Theta, scale: Theta | None) -> dict[str, Array]:
    """Inner products of all rows by leaf; one compiled call a leaf keeps working copies small."""
    scales = [None] * len(jax.tree.leaves(a)) if scale is None else jax.tree.leaves(scale)
    leaves = zip(tree.names(a), jax.tree.leaves(a), jax.tree.leaves(b), scales, strict=True)
    return {path: _product(x, y, p, tree.is_layered(path)) for path, x, y, p in leaves}


@functools.partial(jax.jit, static_argnames="layered")
def _product(x: Array, y: Array, scale: Array | None, layered: bool) -> Array:
    if scale is not None:
        x = x * tree.widen(scale)[None]
    if layered:
        flat = (z.reshape(*z.shape[:2], -1) for z in (x, y))
        return jnp.einsum("uli,vli->uvl", *flat, precision="highest")
    return jnp.einsum(
        "ui,vi->uv", x.reshape(len(x), -1), y.reshape(len(y), -1), precision="highest"
    )
