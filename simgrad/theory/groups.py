"""Group objectives on one prompt's responses: which wrong-answer tokens drag correct ones down.

A group update is -∇L = Σ_j a_j ∇ log π(y_j), a_j > 0 for responses to be reinforced. To first order
(and for the unembedding W alone, from the forward pass),

    d/dt log π(y_i) = Σ_j a_j K_ij,    K_ij = Σ_{k,m} ⟨h_k^i, h_m^j⟩ α_km^{ij}

with α_km^{ij} = ⟨e_k^i, e_m^j⟩ of the errors e = e_y - π. Everything is accumulated over blocks of
R x G R token pairs, one response at a time; no gradient and no token x token x vocabulary array is
formed. ``G`` counts a group's responses.

How a paper scales a_j (division by the standard deviation, by lengths, by G) differs between papers
and between implementations, so the weights are an argument; :func:`group_advantages` is one choice.

Source: Deng et al., arXiv 2505.18830 (negative token hidden reward, group weighted hidden embedding
score).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from simgrad import tree
from simgrad.models import Apply, prediction_error
from simgrad.theory.closed_forms.linear_softmax import token_products
from simgrad.typing import Array, Bool, Float, Int, Theta

__all__ = [
    "Group",
    "group_advantages",
    "group_kernel",
    "group_rates",
    "gwhes",
    "nthr",
    "read_group",
    "token_influence",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Group:
    """G responses to one prompt, as the model read them.

    Attributes:
        hidden: states that predict the response tokens.
        logits: of those states.
        targets: the response tokens.
        valid: which rows hold a response token; what stands in the others does not matter.
    """

    hidden: Float[Array, "G R D"]
    logits: Float[Array, "G R V"]
    targets: Int[Array, "G R"]
    valid: Bool[Array, "G R"]


def read_group(
    apply: Apply, theta: Theta, prompt: Sequence[int], responses: Sequence[Sequence[int]]
) -> Group:
    """Run the model on a prompt and its responses, right-padded to the longest.

    >>> from simgrad.models import ModelConfig, create
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> read_group(apply, theta, [1, 2], [[3], [4, 5], [6, 7, 8]]).valid.tolist()
    [[True, False, False], [True, True, False], [True, True, True]]

    Raises:
        ValueError: no responses, an empty response, or an empty prompt.
    """
    if not (len(prompt) and responses and all(len(r) for r in responses)):
        raise ValueError("a group needs a prompt, and responses of at least one token each")
    start, longest = len(prompt), max(len(r) for r in responses)
    tokens = np.zeros((len(responses), start + longest), np.int32)
    lengths = np.array([[len(r)] for r in responses], np.int32)
    for i, response in enumerate(responses):
        tokens[i, : start + len(response)] = (*prompt, *response)
    at = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    streams = (at < start + lengths).astype(np.int32)
    rows = at[:, start - 1 : -1]
    logits, hidden = _forward(
        apply, theta, *map(jnp.asarray, (tokens, at * streams, streams, rows))
    )
    valid = np.arange(longest) < lengths
    return Group(
        hidden[:, start - 1 : -1], logits, jnp.asarray(tokens[:, start:]), jnp.asarray(valid)
    )


@functools.partial(jax.jit, static_argnames="apply")
def _forward(
    apply: Apply, theta: Theta, tokens: Array, positions: Array, streams: Array, rows: Array
) -> tuple[Array, Array]:
    output = apply(theta, tokens, positions, streams, rows)
    return output.logits, output.hidden


def group_advantages(
    rewards: Float[Array, " G"], ddof: int = 0, epsilon: float = 0.0
) -> Float[Array, " G"]:
    """(r - mean) / (std + epsilon), the group-relative advantage; 0 for a group without contrast.

    With 0/1 rewards and a fraction p of correct responses (``ddof=0``) it is √((1-p)/p) for correct
    and -√(p/(1-p)) for wrong ones. Some implementations divide by the sample deviation (``ddof=1``)
    or add an epsilon of 1e-4. Lengths and G are not divided out here.

    >>> import jax.numpy as jnp
    >>> group_advantages(jnp.array([1.0, 1.0, 0.0, 0.0])).tolist()
    [1.0, 1.0, -1.0, -1.0]
    """
    centred = tree.widen(rewards) - tree.widen(rewards).mean()
    spread = jnp.sqrt(jnp.square(centred).sum() / max(rewards.shape[0] - ddof, 1)) + epsilon
    contrast = rewards.max() > rewards.min()
    return jnp.where(contrast, centred / jnp.where(contrast, spread, 1.0), 0.0)


def token_influence(group: Group) -> Float[Array, "G R G"]:
    """⟨∇_W log π(y_{j,m}), ∇_W log π(y_i)⟩ at [j, m, i]: one token against a whole response.

    Pushing token m of response j up by one unit moves log π(y_i) by this much; 0 where padded.

    >>> import jax.numpy as jnp
    >>> h, nothing = jnp.ones((2, 2, 1)), jnp.zeros((2, 2, 2))
    >>> valid = jnp.array([[True, False], [True, True]])
    >>> group = Group(h, nothing, jnp.array([[0, 0], [0, 1]]), valid)
    >>> token_influence(group)[1, :, 0].tolist()  # the second's tokens on the first response
    [0.5, -0.5]
    """
    hidden = jnp.where(group.valid[..., None], tree.widen(group.hidden), 0.0)
    error = prediction_error(group.logits, group.targets, group.valid)
    responses, rows = group.targets.shape
    flat_hidden, flat_error = (x.reshape(responses * rows, -1) for x in (hidden, error))

    def one(tokens: tuple[Array, Array]) -> Array:
        block = token_products(*tokens, flat_hidden, flat_error)
        return block.reshape(rows, responses, rows).sum(-1)

    return jax.lax.map(one, (hidden, error))


def group_kernel(group: Group) -> Float[Array, "G G"]:
    """K_ij = ⟨∇_W log π(y_i), ∇_W log π(y_j)⟩ of all responses, in nats² per unit of W².

    For G = 2 (chosen, rejected) these are the numbers of :func:`simgrad.theory.head_kernel`.

    >>> import jax.numpy as jnp
    >>> h, nothing = jnp.ones((2, 1, 1)), jnp.zeros((2, 1, 2))
    >>> group_kernel(Group(h, nothing, jnp.array([[0], [1]]), jnp.ones((2, 1), bool))).tolist()
    [[0.5, -0.5], [-0.5, 0.5]]
    """
    return token_influence(group).sum(1)


def group_rates(group: Group, weights: Float[Array, " G"]) -> Float[Array, " G"]:
    """The unembedding's part of d/dt log π(y_i) = Σ_j a_j K_ij under the signed ``weights`` a.

    >>> import jax.numpy as jnp
    >>> h, nothing = jnp.ones((2, 1, 1)), jnp.zeros((2, 1, 2))
    >>> group = Group(h, nothing, jnp.array([[0], [1]]), jnp.ones((2, 1), bool))
    >>> group_rates(group, jnp.array([1.0, -1.0])).tolist()
    [1.0, -1.0]
    """
    kernel = group_kernel(group)
    return (kernel * weights.astype(kernel.dtype)[:, None]).sum(0)


def nthr(group: Group, correct: Bool[Array, " G"]) -> Float[Array, "G R"]:
    """Negative token hidden reward of each token m of each wrong response j.

        s_jm = Σ_{i correct} Σ_k α_km^{ij} ⟨h_k^i, h_m^j⟩

    Punishing a token with a large positive score takes most from the correct responses: with the
    weight -a on it, their log-probs change at the summed rate -a s_jm through the unembedding. Rows
    of correct responses and of padding are 0, since the score is defined for wrong responses only.

    Source: Deng et al., arXiv 2505.18830 (definition of NTHR).

    >>> import jax.numpy as jnp
    >>> h, nothing = jnp.ones((2, 2, 1)), jnp.zeros((2, 2, 2))
    >>> valid = jnp.array([[True, False], [True, True]])
    >>> group = Group(h, nothing, jnp.array([[0, 0], [0, 1]]), valid)
    >>> nthr(group, jnp.array([True, False])).tolist()  # only the shared wrong token costs
    [[0.0, 0.0], [0.5, -0.5]]
    """
    influence = token_influence(group)
    scores = jnp.where(correct[None, None], influence, jnp.zeros((), influence.dtype)).sum(-1)
    return jnp.where(correct[:, None], jnp.zeros((), scores.dtype), scores)


def gwhes(
    group: Group, correct: Bool[Array, " G"], weights: Float[Array, " G"]
) -> Float[Array, " G"]:
    """Group weighted hidden embedding score of each correct response i, and 0 for wrong ones.

        GWHES_i = p⁻ Σ_{j wrong} K_ij - p⁺ Σ_{j correct} K_ij,    with signed weights a = p⁺ or -p⁻

    It is minus the unembedding's part of d/dt log π(y_i), so a positive score means that the group
    update lowers that correct response. ``weights`` may be any signed numbers
    (:func:`group_advantages`, divided by lengths or not); only their normalisation differs between
    papers.

    Source: Deng et al., arXiv 2505.18830 (definition of GWHES).

    >>> import jax.numpy as jnp
    >>> h, nothing = jnp.ones((2, 2, 1)), jnp.zeros((2, 2, 2))
    >>> group = Group(h, nothing, jnp.zeros((2, 2), int), jnp.array([[True, False], [True, True]]))
    >>> correct, weights = jnp.array([True, False]), jnp.array([1.0, -1.0])
    >>> gwhes(group, correct, weights).tolist()  # positive: the correct one falls
    [0.5, 0.0]
    """
    rates = group_rates(group, weights)
    return jnp.where(correct, -rates, jnp.zeros((), rates.dtype))
