"""Pytrees: selection and inner products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simgrad import tree

THETA = {
    "a": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(2)},
    "b": {"table": jnp.full((2, 2), 2.0)},
}


def test_partition_and_combine_are_inverse():
    for patterns in (None, ["a/*"], ["!*/bias"], ["*/kernel", "b/*", "!b/*"]):
        kept, rest = tree.partition(THETA, patterns)
        back = tree.combine(kept, rest)
        assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), back, THETA))
        assert len(jax.tree.leaves(kept)) + len(jax.tree.leaves(rest)) == 3


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="no parameter matches 'c/"):
        tree.partition(THETA, ["c/*"])
    # a misspelt exclusion would train what it means to leave out
    with pytest.raises(ValueError, match="no parameter matches '!c/"):
        tree.partition(THETA, ["!c/*"])
    with pytest.raises(ValueError, match="no parameter is left"):
        tree.partition(THETA, ["a/*", "!*"])


def test_inner_is_the_flat_dot_product():
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(THETA)])
    assert tree.inner(THETA, THETA) == pytest.approx(flat @ flat)


def test_long_low_precision_vectors_keep_their_norm():
    """A million bfloat16 entries: summed in bfloat16 the norm stalls, here it does not."""
    x = jnp.full((1000, 1000), 0.1, jnp.bfloat16)
    exact = float(np.square(np.asarray(x, np.float64)).sum())
    assert float(tree.dot(x, x)) == pytest.approx(exact, rel=1e-5)
    stalled = jax.lax.fori_loop(
        0, 10_000, lambda _, total: total + x[0, 0] * x[0, 0], jnp.zeros((), jnp.bfloat16)
    )
    assert float(stalled) < 0.1 * exact / 100
