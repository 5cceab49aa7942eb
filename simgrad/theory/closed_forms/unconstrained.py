"""Closed forms for unconstrained features: logits = W h(context), W and every h(context) learn.

Each context has a state of its own, so a gradient has two parts. For tokens y after context s and
y' after s', with errors e = e_y - π(·|s), e' = e_{y'} - π(·|s'):

    ⟨∇ log π(y|s), ∇ log π(y'|s')⟩ = ⟨h_s, h_{s'}⟩ ⟨e, e'⟩ + [s = s'] ⟨W^T e, W^T e'⟩

The first term is the unembedding's, the second the features', which only tokens after one and the
same context share. Everything here is a sum of such terms: under gradient flow on a pair with
-∇L = d_w g_w - d_l g_l, d/dt log π(v) = d_w ⟨∇ log π(v), g_w⟩ - d_l ⟨∇ log π(v), g_l⟩. Rates "per
unit of c" are for d_w = d_l = 1 and are multiplied by c = -ℓ'(m) (β σ(-β m) for DPO); unit: nats
per unit of time.

Setting and the case distinctions: Razin et al., arXiv 2410.08847, Theorems 1-3. The general form
for any responses, with shared prefixes and unequal weights, is derived here. ``M`` counts a second
response's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from simgrad import tree
from simgrad.models import Responses, prediction_error
from simgrad.pairs import Batch
from simgrad.theory.closed_forms.linear_softmax import response_inner, shared_lengths
from simgrad.theory.kernel.gram import PairKernel, row_inner
from simgrad.theory.kernel.pair import head_kernel
from simgrad.typing import Array, Bool, Float, Int

__all__ = [
    "MultiTokenRate",
    "SingleTokenRate",
    "StateInner",
    "TokenStates",
    "contributions",
    "different_first_tokens_rate",
    "mass_direction",
    "mass_rates",
    "sft_rate",
    "single_token_rate",
    "state_inner",
    "state_kernel",
    "token_states",
    "unconstrained_kernel",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenStates:
    """What the closed forms need to know of each token of a response.

    Attributes:
        context: an id of what was read before the token; equal ids mean one and the same state.
        hidden: h(context).
        error: e_y - π(·|context), 0 where padded.
    """

    context: Int[Array, "*n R"]
    hidden: Float[Array, "*n R D"]
    error: Float[Array, "*n R V"]


def token_states(
    unembedding: Float[Array, "V D"],
    hidden: Float[Array, "*n R D"],
    targets: Int[Array, "*n R"],
    context: Int[Array, "*n R"],
    valid: Bool[Array, "*n R"] | None = None,
) -> TokenStates:
    """Evaluate the model W h at the contexts that predict the ``targets``.

    >>> import jax.numpy as jnp
    >>> token_states(jnp.eye(2), jnp.zeros((1, 2)), jnp.array([0]), jnp.array([7])).error.tolist()
    [[0.5, -0.5]]
    """
    if valid is not None:
        hidden = jnp.where(valid[..., None], hidden, jnp.zeros((), hidden.dtype))
    logits = jnp.einsum(
        "...rd,vd->...rv", tree.widen(hidden), tree.widen(unembedding), precision="highest"
    )
    return TokenStates(context, hidden, prediction_error(logits, targets, valid))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StateInner:
    """An inner product of log-prob gradients, by trained parameter.

    Attributes:
        unembedding: the part of W: Σ ⟨h_k, h'_m⟩ ⟨e_k, e'_m⟩ over all token pairs.
        features: the part of the features: Σ ⟨W^T e_k, W^T e'_m⟩ over token pairs with equal
            contexts.
    """

    unembedding: Float[Array, "*n"]
    features: Float[Array, "*n"]

    @property
    def total(self) -> Float[Array, "*n"]:
        """Over all parameters."""
        return self.unembedding + self.features


def state_inner(
    unembedding: Float[Array, "V D"], response: TokenStates, other: TokenStates
) -> StateInner:
    """⟨∇ log π(y|x), ∇ log π(y'|x')⟩ for any two responses, exactly.

    Covers shared prefixes and repeated contexts, within a pair or across prompts. Derived here;
    with different first tokens it is the setting of Theorem 3 of Razin et al., arXiv 2410.08847.

    >>> import jax.numpy as jnp
    >>> w, h = jnp.eye(2), jnp.ones((1, 2))
    >>> a = token_states(w, h, jnp.array([0]), jnp.array([0]))
    >>> elsewhere = token_states(w, h, jnp.array([0]), jnp.array([1]))
    >>> state_inner(w, a, a).features.item(), state_inner(w, a, elsewhere).features.item()
    (0.5, 0.0)
    """
    pulled = row_inner(_pulled(unembedding, response), _pulled(unembedding, other))
    same = response.context[..., :, None] == other.context[..., None, :]
    return StateInner(
        response_inner(response.hidden, response.error, other.hidden, other.error),
        jnp.where(same, pulled, jnp.zeros((), pulled.dtype)).sum(-1).sum(-1),
    )


def _pulled(unembedding: Array, states: TokenStates) -> Float[Array, "*n R D"]:
    """W^T e, the gradient of each token's log-prob with respect to its state."""
    return jnp.einsum("...rv,vd->...rd", states.error, tree.widen(unembedding), precision="highest")


def state_kernel(
    unembedding: Float[Array, "V D"], chosen: TokenStates, rejected: TokenStates
) -> PairKernel:
    """‖g_w‖², ⟨g_w,g_l⟩ and ‖g_l‖² of a pair, for the functions of the general theory.

    They are :func:`simgrad.theory.first_order` and :func:`simgrad.theory.regime`.

    d/dt log π_w = d_w ‖g_w‖² - d_l ⟨g_w,g_l⟩ holds for any weights, with or without a shared
    prefix, so the chosen does not fall from d_w / d_l = ⟨g_w,g_l⟩ / ‖g_w‖² on
    (:func:`simgrad.theory.ideal_range`).

    >>> import jax.numpy as jnp
    >>> w, h, first = jnp.array([[1.0], [2.0], [-3.0]]), jnp.zeros((1, 1)), jnp.array([0])
    >>> chosen, rejected = (token_states(w, h, jnp.array([y]), first) for y in (0, 1))
    >>> round(state_kernel(w, chosen, rejected).gap.item(), 6)  # W_w is between W_l and the mean
    1.0
    """

    def total(x: TokenStates, y: TokenStates) -> Array:
        return state_inner(unembedding, x, y).total

    return PairKernel(total(chosen, chosen), total(chosen, rejected), total(rejected, rejected))


def unconstrained_kernel(
    unembedding: Float[Array, "V D"], result: Responses, batch: Batch
) -> PairKernel:
    """:func:`state_kernel` of every pair in a batch, from the forward pass alone.

    Exact for an unconstrained-features model. On a transformer it replaces everything below the
    unembedding by free states, so it is a score, not the kernel. Contexts coincide up to and
    including the first differing token of a pair.

    >>> import jax.numpy as jnp
    >>> from simgrad.pairs import Pair, padded
    >>> batch = padded([Pair([1], [0], [1])])
    >>> h, logits = jnp.zeros((1, 2, 1, 1)), jnp.zeros((1, 2, 1, 3))
    >>> result = Responses(jnp.zeros((1, 2, 1)), logits, h, h[:, :, 0])
    >>> kernel = unconstrained_kernel(jnp.array([[1.0], [2.0], [-3.0]]), result, batch)
    >>> round(kernel.gap.item(), 6), head_kernel(result, batch).gap.item()
    (1.0, 0.0)
    """
    error = prediction_error(result.logits, batch.targets, batch.valid)
    pulled = jnp.einsum("bsrv,vd->bsrd", error, tree.widen(unembedding), precision="highest")
    row = jnp.arange(error.shape[2], dtype=batch.rows.dtype)[None]
    shared = row <= shared_lengths(batch).prefix.astype(row.dtype)[:, None]

    def same_context(keep: Array, x: Array, y: Array) -> Array:
        return ((x * y).sum(-1) * keep).sum(-1)

    w, l = pulled[:, 0], pulled[:, 1]  # noqa: E741
    every = jnp.ones(shared.shape, error.dtype)
    features = PairKernel(
        same_context(every, w, w),
        same_context(shared.astype(error.dtype), w, l),
        same_context(every, l, l),
    )
    return head_kernel(result, batch) + features


def contributions(
    unembedding: Float[Array, "V D"],
    response: TokenStates,
    training: TokenStates,
    weights: Float[Array, " n"],
) -> StateInner:
    """What each training response adds to d/dt log π of ``response``; the total's sum is the rate.

    ``training`` stacks n responses on a leading axis and ``weights`` are signed, -∇L = Σ_i
    weights_i g_i: d_w for a chosen, -d_l for a rejected response, each over the number of pairs if
    the loss is a mean. Samples with other prompts enter only through the unembedding, α ⟨h_x,
    h_x'⟩, because their contexts differ. Source: Razin et al., arXiv 2410.08847 (extension to many
    samples); general form derived here.

    >>> import jax.numpy as jnp
    >>> w, h, y = jnp.eye(2), jnp.ones((2, 1, 2)), jnp.zeros((2, 1), int)
    >>> training = token_states(w, h, y, jnp.array([[0], [7]]))  # the second under another prompt
    >>> parts = contributions(w, token_states(w, h[0], y[0], jnp.array([0])), training, jnp.ones(2))
    >>> parts.unembedding.tolist(), parts.features.tolist()
    ([1.0, 1.0], [0.5, 0.0])
    """
    inner = jax.vmap(lambda other: state_inner(unembedding, response, other))(training)
    return jax.tree.map(lambda x: weights * x, inner)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SingleTokenRate:
    """d/dt log π(y⁺) per unit of c for one-token responses, in its four parts.

    Attributes:
        norms: (1 - π⁺) ‖W₊‖² + π⁻ ‖W₋‖² ≥ 0.
        state: (1 - π⁺ + π⁻) ‖h‖² ≥ 0; all that remains when the features are frozen.
        alignment: -(1 - π⁺ + π⁻) ⟨W₊, W₋⟩.
        others: -Σ_{z ≠ y±} π_z ⟨W_z, W₊ - W₋⟩.
    """

    norms: Float[Array, ""]
    state: Float[Array, ""]
    alignment: Float[Array, ""]
    others: Float[Array, ""]

    @property
    def self_term(self) -> Float[Array, ""]:
        """The two parts that never push the chosen token down."""
        return self.norms + self.state

    @property
    def total(self) -> Float[Array, ""]:
        """d/dt log π(y⁺) per unit of c."""
        return self.self_term + self.alignment + self.others


def single_token_rate(
    unembedding: Float[Array, "V D"],
    hidden: Float[Array, " D"],
    chosen: Int[Array, ""],
    rejected: Int[Array, ""],
) -> SingleTokenRate:
    """d/dt log π(y⁺) under gradient flow on one pair of single tokens, d_w = d_l.

    With the tokens' roles exchanged the same function gives -d/dt log π(y⁻). Source: Razin et al.,
    arXiv 2410.08847, Theorem 1.

    >>> import jax.numpy as jnp
    >>> w = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> rate = single_token_rate(w, jnp.zeros(2), jnp.array(0), jnp.array(1))
    >>> rate.norms.item(), rate.state.item(), rate.total.item()
    (1.0, 0.0, 1.0)
    """
    w, h = tree.widen(unembedding), tree.widen(hidden)
    probs = jax.nn.softmax(_readout(w, h))
    plus, minus = w[chosen], w[rejected]
    p, q = probs[chosen], probs[rejected]
    rest = probs.at[jnp.stack([chosen, rejected])].set(0.0)
    return SingleTokenRate(
        norms=(1 - p) * tree.dot(plus, plus) + q * tree.dot(minus, minus),
        state=(1 - p + q) * tree.dot(h, h),
        alignment=-(1 - p + q) * tree.dot(plus, minus),
        others=-tree.dot(rest, mass_direction(w, chosen, rejected)),
    )


def mass_direction(
    unembedding: Float[Array, "V D"], chosen: Int[Array, ""], rejected: Int[Array, ""]
) -> Float[Array, " V"]:
    """⟨W_z, W₊ - W₋⟩ for every token z: where the mass of a single-token pair goes.

    Tokens outside the pair gain in the order of this score (d_w = d_l, one context, features
    trained): all other terms of :func:`mass_rates` are common to them. The chosen and the rejected
    token have terms of their own and do not fit into the order, and with d_w ≠ d_l no token needs
    to. Source: Razin et al., arXiv 2410.08847, Theorem 2.

    >>> import jax.numpy as jnp
    >>> mass_direction(jnp.array([[1.0], [-1.0], [2.0]]), jnp.array(0), jnp.array(1)).tolist()
    [2.0, -2.0, 4.0]
    """
    w = tree.widen(unembedding)
    return _readout(w, w[chosen] - w[rejected])


def mass_rates(
    unembedding: Float[Array, "V D"],
    hidden: Float[Array, " D"],
    chosen: Int[Array, ""],
    rejected: Int[Array, ""],
    chosen_weight: float | Float[Array, ""] = 1.0,
    rejected_weight: float | Float[Array, ""] = 1.0,
) -> Float[Array, " V"]:
    """d/dt log π(z) of every token z under gradient flow on one pair of single tokens.

    With the pull u = d_w (e₊ - π) - d_l (e₋ - π) on the logits,

        d/dt log π(z) = ‖h‖² ⟨e_z - π, u⟩ + ⟨W_z - Σ_q π_q W_q, W^T u⟩,

    which for d_w = d_l = 1 and z outside the pair reads ⟨W_z, W₊ - W₋⟩ + (π⁻ - π⁺) ‖h‖² - Σ_q π_q
    ⟨W_q, W₊ - W₋⟩. Entries ``chosen`` and ``rejected`` are d/dt log π(y⁺) and d/dt log π(y⁻). Equal
    weights: Razin et al., arXiv 2410.08847, Theorem 2; any weights derived here.

    >>> import jax.numpy as jnp
    >>> mass_rates(jnp.eye(3), jnp.zeros(3), jnp.array(0), jnp.array(1)).tolist()
    [1.0, -1.0, 0.0]
    """
    w, h = tree.widen(unembedding), tree.widen(hidden)
    logits = _readout(w, h)
    pull = chosen_weight * prediction_error(logits, chosen) - rejected_weight * prediction_error(
        logits, rejected
    )
    moved = tree.dot(h, h) * pull + _readout(w, jnp.einsum("v,vd->d", pull, w, precision="highest"))
    return moved - tree.dot(jax.nn.softmax(logits), moved)


def _readout(w: Array, state: Array) -> Float[Array, " V"]:
    return jnp.einsum("vd,d->v", w, state, precision="highest")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MultiTokenRate:
    """d/dt log π(y⁺) per unit of c for responses whose first tokens differ, in its four parts.

    Attributes:
        norms: (1 - π₁⁺) ‖W_{y₁⁺}‖² + π₁⁻ ‖W_{y₁⁻}‖² + Σ_{k ≥ 2} ‖W_{y_k⁺} - Σ_z π_z W_z‖² ≥ 0.
        first: both negative terms of :class:`SingleTokenRate` at the first token, the one context
            that the responses have in common.
        cross: -Σ α⁻_{km} ⟨h⁺_k, h⁻_m⟩ with α⁻_{km} = ⟨e⁺_k, e⁻_m⟩ ∈ [-2, 2].
        own: Σ α⁺_{km} ⟨h⁺_k, h⁺_m⟩ = ‖∇_W log π(y⁺)‖² ≥ 0.
    """

    norms: Float[Array, ""]
    first: Float[Array, ""]
    cross: Float[Array, ""]
    own: Float[Array, ""]

    @property
    def total(self) -> Float[Array, ""]:
        """d/dt log π(y⁺) per unit of c."""
        return self.norms + self.first + self.cross + self.own


def different_first_tokens_rate(
    unembedding: Float[Array, "V D"],
    chosen: TokenStates,
    rejected: TokenStates,
    chosen_token: Int[Array, ""],
    rejected_token: Int[Array, ""],
) -> MultiTokenRate:
    """d/dt log π(y⁺) for responses to one prompt that differ from their first tokens on.

    The two tokens are the first ones. With every α set to 1, own + cross is minus the CHES score
    (:func:`simgrad.theory.ches`). Responses that share a first token break this formula: more
    contexts then coincide, and :func:`state_kernel` counts them. Source: Razin et al., arXiv
    2410.08847, Theorem 3.

    >>> import jax.numpy as jnp
    >>> w, h, first = jnp.array([[1.0], [2.0], [-3.0]]), jnp.zeros((1, 1)), jnp.array([0])
    >>> chosen, rejected = (token_states(w, h, jnp.array([y]), first) for y in (0, 1))
    >>> rate = different_first_tokens_rate(w, chosen, rejected, jnp.array(0), jnp.array(1))
    >>> round(rate.norms.item(), 6), round(rate.first.item(), 6)
    (2.0, -3.0)
    """
    start = single_token_rate(unembedding, chosen.hidden[0], chosen_token, rejected_token)
    later = _pulled(unembedding, chosen)[1:]
    return MultiTokenRate(
        norms=start.norms + tree.dot(later, later),
        first=start.alignment + start.others,
        cross=-response_inner(chosen.hidden, chosen.error, rejected.hidden, rejected.error),
        own=response_inner(chosen.hidden, chosen.error, chosen.hidden, chosen.error),
    )


def sft_rate(kernel: PairKernel, weight: float | Float[Array, "*pairs"]) -> Float[Array, "*pairs"]:
    """λ ‖∇ log π(y⁺)‖² ≥ 0, the part of d/dt log π(y⁺) from a loss -λ log π(y⁺), in any model.

    Source: Razin et al., arXiv 2410.08847 (an SFT term alongside the preference loss).

    >>> import jax.numpy as jnp
    >>> kernel = PairKernel(jnp.array([1.0]), jnp.array([1.5]), jnp.array([4.0]))
    >>> (sft_rate(kernel, 0.5) - kernel.gap).item()  # just enough for the chosen not to fall
    0.0
    """
    return weight * kernel.sq_chosen
