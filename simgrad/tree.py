"""Pytrees of parameters: names, selections, inner products that do not drift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import Any

import jax
import jax.numpy as jnp

from simgrad.typing import Array, Float, Theta

__all__ = [
    "accumulator",
    "by_name",
    "combine",
    "dot",
    "inner",
    "is_layered",
    "names",
    "partition",
    "pulled_back",
    "selected",
    "widen",
]


def names(theta: Theta) -> list[str]:
    """Path of every leaf, in tree order.

    >>> names({"embedding": {"table": 0}, "final_norm": {"scale": 0}})
    ['embedding/table', 'final_norm/scale']
    """
    paths, _ = zip(*jax.tree_util.tree_leaves_with_path(theta), strict=True)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


def by_name(theta: Theta) -> dict[str, Any]:
    """Every leaf by its path, in tree order.

    >>> by_name({"embedding": {"table": 0}})
    {'embedding/table': 0}
    """
    return dict(zip(names(theta), jax.tree.leaves(theta), strict=True))


def is_layered(name: str) -> bool:
    """Whether the leaf at this path is stacked over layers on its leading axis.

    >>> is_layered("layers/mlp/up/kernel"), is_layered("lora/layers/mlp/up/kernel/a")
    (True, True)
    >>> is_layered("embedding/table")
    False
    """
    return "layers" in name.split("/")


def selected(name: str, patterns: Sequence[str] | None) -> bool:
    """Whether a leaf's path is selected: by some pattern, and by none that begins with ``!``.

    None, and patterns that only exclude, select everything else.

    >>> [selected("layers/mlp/up/kernel", [pattern]) for pattern in ("layers/*", "!*/kernel")]
    [True, False]
    """
    take = [p for p in patterns or () if not p.startswith("!")]
    leave = [p[1:] for p in patterns or () if p.startswith("!")]
    there = not take or any(fnmatch(name, p) for p in take)
    return there and not any(fnmatch(name, p) for p in leave)


def partition(theta: Theta, patterns: Sequence[str] | None = None) -> tuple[Theta, Theta]:
    """Split ``theta`` into two equal-shaped trees: selected leaves, and the rest (None elsewhere).

    Patterns are ``fnmatch`` patterns over :func:`names`, see :func:`selected`; :func:`combine` puts
    the trees together again.

    >>> partition({"a": {"kernel": 1, "bias": 2}}, ["*/kernel"])
    ({'a': {'bias': None, 'kernel': 1}}, {'a': {'bias': 2, 'kernel': None}})

    Raises:
        ValueError: a pattern matches nothing, or nothing is left.
    """
    leaves, treedef = jax.tree.flatten(theta)
    paths = names(theta)
    for pattern in patterns or ():
        if not any(fnmatch(name, pattern.removeprefix("!")) for name in paths):
            raise ValueError(f"no parameter matches {pattern!r}; there are: {', '.join(paths)}")
    keep = [selected(name, patterns) for name in paths]
    if not any(keep):
        raise ValueError(f"no parameter is left to train: {', '.join(patterns or ())}")
    chosen = treedef.unflatten([x if k else None for x, k in zip(leaves, keep, strict=True)])
    rest = treedef.unflatten([None if k else x for x, k in zip(leaves, keep, strict=True)])
    return chosen, rest


def combine(first: Theta, second: Theta) -> Theta:
    """Undo :func:`partition`: leaves of ``first``, and where it has None those of ``second``.

    >>> combine({"a": 1, "b": None}, {"a": None, "b": 2})
    {'a': 1, 'b': 2}
    """
    return jax.tree.map(
        lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None
    )


def accumulator(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Dtype in which sums over values of ``dtype`` are accumulated: float32 or better.

    >>> accumulator("bfloat16"), accumulator("float64")
    (dtype('float32'), dtype('float64'))
    """
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def widen(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``x`` in its accumulator's dtype, see :func:`accumulator`.

    >>> widen(jnp.ones(2, "bfloat16")).dtype
    dtype('float32')
    """
    return x.astype(accumulator(x.dtype))


def dot(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Sum of products in float32 or better, last axis first so that rounding does not pile up.

    >>> dot(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])).item()
    11.0
    """
    product = widen(a) * widen(b)
    return product.sum(-1).sum() if product.ndim else product


def pulled_back(
    pullback: Callable[[Array], tuple[Theta]], cotangents: Float[Array, "n *shape"]
) -> Theta:
    """Gradients of n cotangents, stacked: one backward pass after the other.

    Not ``jax.vmap``: XLA's CPU compiler in jaxlib 0.10.2 gets vmapped backward passes of a norm
    wrong in float32, without a word, once they hold more than 65,536 numbers.
    """
    return jax.lax.map(lambda cotangent: pullback(cotangent)[0], cotangents)


def inner(a: Theta, b: Theta) -> Float[Array, ""]:
    """Inner product of two trees: leaf by leaf, then the sum.

    >>> import jax.numpy as jnp
    >>> inner({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 4.0])}).item()
    11.0
    """
    return jnp.stack(jax.tree.leaves(jax.tree.map(dot, a, b))).sum()
