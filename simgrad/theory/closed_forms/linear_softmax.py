"""Closed forms for frozen features and a trained unembedding: logits = W φ, only W learns.

The gradient of one token is an outer product, ∇_W log π(y|φ) = (e_y - π) φ^T, so every inner
product of gradients is a product of two numbers that a forward pass yields:

    ⟨∇_W log π(y|φ), ∇_W log π(y'|φ')⟩ = ⟨φ, φ'⟩ ⟨e_y - π, e_{y'} - π'⟩

For any other model with an untied unembedding this is the exact contribution of that matrix (see
:func:`simgrad.theory.head_kernel`), and the features are the states that multiply it. Sums over R
tokens are taken over R x R numbers; no V x D gradient is formed. ``M`` counts the tokens of a
second response.

Setting: Yuan et al., arXiv 2410.13828, Sec. 4 (linear model over fixed features); closed forms
derived here.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from simgrad import tree
from simgrad.models import Responses, prediction_error
from simgrad.pairs import Batch
from simgrad.theory.kernel.gram import PairKernel, chosen_and_rejected, row_inner, sides
from simgrad.typing import Array, Float, Int

__all__ = [
    "SharedLengths",
    "SharedParts",
    "response_inner",
    "shared_lengths",
    "shared_parts",
    "single_token_kernel",
    "single_token_rise",
    "token_products",
    "with_shared_tokens",
]


def token_products(
    hidden: Float[Array, "*n R D"],
    error: Float[Array, "*n R V"],
    other_hidden: Float[Array, "*n M D"],
    other_error: Float[Array, "*n M V"],
) -> Float[Array, "*n R M"]:
    """⟨∇_W log π(y_k), ∇_W log π(y'_m)⟩ for all tokens k of one response and m of another.

    The block is (H H'^T) ∘ (E E'^T) with the states h as rows of H and the errors e - π
    (:func:`prediction_error`) as rows of E. Unit: nats² per unit of W².

    >>> import jax.numpy as jnp
    >>> h, e = jnp.array([[2.0, 0.0]]), jnp.array([[0.5, -0.5]])
    >>> token_products(h, e, h, -e).tolist()
    [[-2.0]]
    """
    return row_inner(hidden, other_hidden) * row_inner(error, other_error)


def response_inner(
    hidden: Float[Array, "*n R D"],
    error: Float[Array, "*n R V"],
    other_hidden: Float[Array, "*n M D"],
    other_error: Float[Array, "*n M V"],
) -> Float[Array, "*n"]:
    """⟨∇_W log π(y|x), ∇_W log π(y'|x')⟩ of whole responses: the sum of :func:`token_products`.

    >>> import jax.numpy as jnp
    >>> h, e = jnp.array([[2.0, 0.0]]), jnp.array([[0.5, -0.5]])
    >>> long_h, long_e = jnp.repeat(h, 3, 0), jnp.repeat(e, 3, 0)
    >>> long = (long_h, long_e)
    >>> response_inner(h, e, *long).item(), response_inner(*long, *long).item()
    (6.0, 18.0)
    """
    return token_products(hidden, error, other_hidden, other_error).sum(-1).sum(-1)


def single_token_kernel(
    hidden: Float[Array, "*pairs D"],
    logits: Float[Array, "*pairs V"],
    chosen: Int[Array, "*pairs"],
    rejected: Int[Array, "*pairs"],
) -> PairKernel:
    """Kernel of one-token responses under one context, from two probabilities and two norms.

        ‖g_w‖² = ‖h‖² (1 - 2 π_w + ‖π‖²)      ⟨g_w,g_l⟩ = ‖h‖² (‖π‖² - π_w - π_l)

    The inner product is negative exactly when π_w + π_l > ‖π‖². It is positive when the mass sits
    on other tokens: both responses then gain by taking it away from there.

    >>> import jax.numpy as jnp
    >>> h, w, l = jnp.ones((1, 2)), jnp.array([0]), jnp.array([1])
    >>> single_token_kernel(h, jnp.array([[0.0, 0.0, 0.0]]), w, l).inner.item() < 0
    True
    >>> single_token_kernel(h, jnp.array([[0.0, 0.0, 5.0]]), w, l).inner.item() < 0
    False
    """
    e_w, e_l = prediction_error(logits, chosen), prediction_error(logits, rejected)
    square = jnp.square(tree.widen(hidden)).sum(-1)
    return PairKernel(*(square * (x * y).sum(-1) for x, y in ((e_w, e_w), (e_w, e_l), (e_l, e_l))))


def single_token_rise(
    hidden: Float[Array, "*pairs D"],
    logits: Float[Array, "*pairs V"],
    chosen: Int[Array, "*pairs"],
    rejected: Int[Array, "*pairs"],
) -> Float[Array, "*pairs"]:
    """‖g_w‖² - ⟨g_w,g_l⟩ = ‖h‖² (1 - π_w + π_l) ≥ 0: one token under one context cannot fall.

    This is d/dt log π_w per unit of the common weight d_w = d_l. It takes three assumptions: both
    responses are one token after one context, the features are frozen, and the weights are equal.
    Without any one of them the chosen response can fall. For responses that differ in their last
    token only it is the rate of that token's log-prob; the tokens before it can lose more than it
    gains.

    >>> import jax.numpy as jnp
    >>> h, logits, (w, l) = jnp.ones((1, 2)), jnp.zeros((1, 4)), jnp.array([[0], [1]])
    >>> single_token_rise(h, logits, w, l).item()
    2.0
    """
    still_free = _at(prediction_error(logits, chosen), chosen)  # 1 - π_w
    rejected_prob = _at(jax.nn.softmax(tree.widen(logits), axis=-1), rejected)
    return jnp.square(tree.widen(hidden)).sum(-1) * (still_free + rejected_prob)


def _at(probs: Array, token: Array) -> Array:
    return jnp.take_along_axis(probs, token[..., None], axis=-1)[..., 0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedLengths:
    """Tokens that both responses of a pair begin with, and (of the rest) end with."""

    prefix: Int[Array, " B"]
    suffix: Int[Array, " B"]


def shared_lengths(batch: Batch) -> SharedLengths:
    """Longest common prefix of both responses, and longest common suffix of what remains.

    >>> from simgrad.pairs import Pair, padded
    >>> lengths = shared_lengths(padded([Pair([1], [5, 7, 2, 9], [5, 8, 8, 2, 9])]))
    >>> lengths.prefix.tolist(), lengths.suffix.tolist()
    ([1], [2])
    """
    (w, l), n = sides(batch.targets), batch.lengths  # noqa: E741
    row = jnp.arange(batch.targets.shape[-1], dtype=n.dtype)
    both = row[None] < n.min(-1)[:, None]
    prefix = _leading((w == l) & both)
    backwards = (
        jnp.take_along_axis(x, jnp.maximum(n[:, i, None] - 1 - row[None], 0), -1)
        for i, x in enumerate((w, l))
    )
    room = n.min(-1) - prefix
    return SharedLengths(prefix, jnp.minimum(_leading(jnp.equal(*backwards) & both), room))


def _leading(same: Array) -> Array:
    return jnp.cumprod(same.astype(jnp.int32), axis=-1).sum(-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedParts:
    """The unembedding's kernel, split by which tokens of the two responses meet.

    Attributes:
        prefix: shared leading tokens with each other. They have the same states and targets in both
            responses, so its three numbers are one and the same square: its gap is 0 and its cosine
            1.
        contrast: the differing tokens with each other.
        suffix: shared trailing tokens with each other: same targets, different states.
        cross: all products between different parts.
    """

    prefix: PairKernel
    contrast: PairKernel
    suffix: PairKernel
    cross: PairKernel

    @property
    def total(self) -> PairKernel:
        """The whole kernel, equal to :func:`simgrad.theory.head_kernel`."""
        return self.prefix + self.contrast + self.suffix + self.cross


def shared_parts(result: Responses, batch: Batch) -> SharedParts:
    """Split the unembedding's kernel of each pair at the ends of the shared prefix and suffix.

    Because the prefix adds the same number to ‖g_w‖², ⟨g_w,g_l⟩ and ‖g_l‖², it raises the cosine
    but adds nothing to ‖g_w‖² - ⟨g_w,g_l⟩: under equal weights and with frozen features only a
    suffix, the contrast or cross terms can make the chosen fall. A differing token that nothing
    follows has contrast ⟨·,·⟩ = ‖h‖² (‖π‖² - π_w - π_l), see :func:`single_token_kernel`.

    Source: the prefix and suffix cases of Yuan et al., arXiv 2410.13828, Sec. 4; decomposition
    derived here.

    >>> import jax.numpy as jnp
    >>> from simgrad.pairs import Pair, padded
    >>> h, logits = jnp.ones((1, 2, 2, 1)), jnp.zeros((1, 2, 2, 2))
    >>> result = Responses(jnp.zeros((1, 2, 2)), logits, h, h[:, :, 0])
    >>> parts = shared_parts(result, padded([Pair([2], [0, 0], [0, 1])]))
    >>> parts.prefix.gap.item(), parts.contrast.gap.item()
    (0.0, -1.0)
    """
    lengths = shared_lengths(batch)
    row = jnp.arange(batch.targets.shape[-1], dtype=lengths.prefix.dtype)[None, None]
    error = prediction_error(result.logits, batch.targets, batch.valid)
    products = chosen_and_rejected(token_products, sides(result.hidden), sides(error))

    before = jnp.broadcast_to(row < lengths.prefix[:, None, None], error.shape[:-1])
    after = (row >= (batch.lengths - lengths.suffix[:, None])[:, :, None]) & ~before
    keep = [_pairwise(mask.astype(error.dtype)) for mask in (before, ~before & ~after, after)]
    different = jax.tree.map(lambda *same: 1 - sum(same), *keep)
    return SharedParts(
        *(
            jax.tree.map(lambda p, k: (p * k).sum(-1).sum(-1), products, k)
            for k in (*keep, different)
        )
    )


def _pairwise(mask: Float[Array, "B 2 R"]) -> PairKernel:
    return chosen_and_rejected(lambda x, y: x[:, :, None] * y[:, None, :], sides(mask))


def with_shared_tokens(
    kernel: PairKernel, shared: PairKernel, count: int | Float[Array, "*pairs"]
) -> PairKernel:
    """Kernel after ``count`` shared tokens are added whose gradients are orthogonal to all others.

    Each adds ``shared``; for a token of a shared prefix its three numbers are equal, s. The cosine
    (⟨g_w,g_l⟩ + n s) / sqrt((‖g_w‖² + n s)(‖g_l‖² + n s)) then tends to 1 as n grows, and it grows
    with every token if ⟨g_w,g_l⟩ ≤ min(‖g_w‖², ‖g_l‖²). Both assumptions matter: a chosen gradient
    much shorter than, and nearly parallel to the rejected one gives a cosine that first falls.
    :attr:`PairKernel.gap` does not change with n. For suffix tokens the limit is the cosine of
    ``shared``, and the gap changes by n times that of ``shared``. Derived here.

    >>> import jax.numpy as jnp
    >>> one = jnp.array([1.0])
    >>> kernel, shared = PairKernel(one, -one, one), PairKernel(one, one, one)
    >>> [round(with_shared_tokens(kernel, shared, n).cosine.item(), 3) for n in (0, 1, 9)]
    [-1.0, 0.0, 0.8]
    """
    return jax.tree.map(lambda a, b: a + count * b, kernel, shared)
