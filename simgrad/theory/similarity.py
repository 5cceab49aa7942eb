"""How alike chosen and rejected are: CHES and its relatives.

All take the :class:`~simgrad.models.likelihood.Responses` of a batch and accumulate in float32 or
better, so that bfloat16 states of width 4096 over hundreds of tokens stay finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from rapidfuzz.distance import Levenshtein

from simgrad import tree
from simgrad.models import Responses
from simgrad.pairs import Batch
from simgrad.theory.kernel.pair import head_kernel
from simgrad.typing import Array, Float

__all__ = [
    "ches",
    "embedding_cosine",
    "head_gap",
    "last_hidden_inner",
    "ln_ches",
    "normalized_edit_distance",
]

States = Literal["predicting", "all"]


def _sums(
    result: Responses, batch: Batch, states: States
) -> tuple[Float[Array, "B 2 D"], Float[Array, "B 2"]]:
    if states not in ("predicting", "all"):
        raise ValueError(
            f"states={states!r}: choose 'predicting' (the definition) or 'all' (keeps the final "
            "state)"
        )
    total = tree.widen(result.hidden).sum(2)
    count = batch.lengths.astype(total.dtype)
    if states == "all":
        total, count = total + tree.widen(result.last_hidden), count + 1
    return total, count


def _centred(states: Float[Array, "B 2 D"]) -> Float[Array, " B"]:
    """⟨s⁺, s⁻ - s⁺⟩: the difference is taken first, where it cancels least."""
    return (states[:, 0] * (states[:, 1] - states[:, 0])).sum(-1)


def ches(result: Responses, batch: Batch, states: States = "predicting") -> Float[Array, " B"]:
    """Centered hidden embedding similarity: ⟨Σ h⁺, Σ h⁻⟩ - ‖Σ h⁺‖².

    ``states="predicting"`` sums over the states that predict the response tokens (last prompt
    position to last-but-one response position), as in Definition 2 of Razin et al. (arXiv
    2410.08847); ``"all"`` also keeps the state at the final response token, as one of the authors'
    scripts does. Unit: squared hidden units. A higher score predicts more displacement of the
    chosen response.

    >>> import jax.numpy as jnp
    >>> from simgrad.pairs import Pair, padded
    >>> h = jnp.array([[[[2.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [2.0, 0.0]]]])
    >>> result = Responses(jnp.zeros((1, 2, 2)), jnp.zeros((1, 2, 2, 3)), h, h[:, :, 1])
    >>> ches(result, padded([Pair([1], [0], [2, 2])])).item()  # 2 · 4 - 2 · 2
    4.0
    """
    total, _ = _sums(result, batch, states)
    return _centred(total)


def ln_ches(result: Responses, batch: Batch, states: States = "predicting") -> Float[Array, " B"]:
    """Length-normalised CHES: ⟨mean h⁺, mean h⁻⟩ - ‖mean h⁺‖², over states as in :func:`ches`.

    With ``states="predicting"`` the divisors are |y⁺||y⁻| and |y⁺|², with ``"all"`` each length is
    one more (the number of states summed). Source: Razin et al., arXiv 2410.08847, Sec. 5.

    >>> import jax.numpy as jnp
    >>> from simgrad.pairs import Pair, padded
    >>> h = jnp.array([[[[2.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [2.0, 0.0]]]])
    >>> result = Responses(jnp.zeros((1, 2, 2)), jnp.zeros((1, 2, 2, 3)), h, h[:, :, 1])
    >>> ln_ches(result, padded([Pair([1], [0], [2, 2])])).item()  # 4 with CHES, all of it length
    0.0
    """
    total, count = _sums(result, batch, states)
    mean = total / count[..., None]
    return _centred(mean)


def last_hidden_inner(result: Responses) -> Float[Array, " B"]:
    """⟨h(x,y⁺), h(x,y⁻)⟩: states that have read the whole responses (at their last tokens).

    Source: the "last hidden embedding inner product" of Razin et al., arXiv 2410.08847, Sec. 5.

    >>> import jax.numpy as jnp
    >>> h = jnp.ones((1, 2, 1, 2))
    >>> last = jnp.array([[[1.0, 2.0], [-2.0, 1.0]]])
    >>> last_hidden_inner(Responses(jnp.zeros((1, 2, 1)), jnp.zeros((1, 2, 1, 3)), h, last)).item()
    0.0
    """
    last = tree.widen(result.last_hidden)
    return (last[:, 0] * last[:, 1]).sum(-1)


def embedding_cosine(result: Responses, batch: Batch) -> Float[Array, " B"]:
    """Cosine of the responses' mean states (over the states that predict their tokens), in [-1, 1].

    The idea of selecting pairs by the similarity of response embeddings is that of REAL (Zhang et
    al., arXiv 2409.17169), which embeds responses without their prompt; here they are read in
    context.

    >>> import jax.numpy as jnp
    >>> from simgrad.pairs import Pair, padded
    >>> h = jnp.array([[[[3.0, 0.0], [0.0, 3.0]], [[1.0, 1.0], [0.0, 0.0]]]])
    >>> result = Responses(jnp.zeros((1, 2, 2)), jnp.zeros((1, 2, 2, 3)), h, h[:, :, 1])
    >>> round(embedding_cosine(result, padded([Pair([1], [0, 2], [2])])).item(), 4)
    1.0
    """
    total, _ = _sums(result, batch, "predicting")
    norm = jnp.sqrt(jnp.square(total).sum(-1))
    return (total[:, 0] * total[:, 1]).sum(-1) / (norm[:, 0] * norm[:, 1])


def head_gap(result: Responses, batch: Batch) -> Float[Array, " B"]:
    """Exact ⟨g_w, g_l⟩ - ‖g_w‖² of the unembedding alone: CHES with every α_{kk'} kept.

    See :func:`simgrad.theory.kernel.pair.head_kernel`. Nats² per unit of W².

    >>> import jax.numpy as jnp
    >>> from simgrad.pairs import Pair, padded
    >>> h, logits = jnp.ones((1, 2, 1, 1)), jnp.zeros((1, 2, 1, 2))
    >>> result = Responses(jnp.zeros((1, 2, 1)), logits, h, h[:, :, 0])
    >>> batch = padded([Pair([2], [0], [1])])
    >>> ches(result, batch).item(), head_gap(result, batch).item()
    (0.0, -1.0)
    """
    return head_kernel(result, batch).gap


def normalized_edit_distance(chosen: Sequence[int], rejected: Sequence[int]) -> float:
    """Levenshtein distance of two token sequences over the longer length, in [0, 1].

    Source: the edit-distance baseline of Razin et al., arXiv 2410.08847, Sec. 5.

    >>> normalized_edit_distance([1, 2, 3], [1, 3])
    0.3333333333333333
    """
    return Levenshtein.normalized_distance(chosen, rejected)
