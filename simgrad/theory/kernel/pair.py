"""The entanglement kernel: inner products of gradients of response log-probs.

For one pair K = [[‖g_w‖², ⟨g_w,g_l⟩], [⟨g_w,g_l⟩, ‖g_l‖²]] with g = ∇_θ log π(y|x), over all
trainable parameters or a named subset. A parameter subset's kernel is the sum of its leaves'
kernels, and every number here is accumulated leaf by leaf in float32 or better.
"""

from __future__ import annotations

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from simgrad import tree
from simgrad.models import Apply, Responses, TappedApply, bind, prediction_error, responses
from simgrad.pairs import Batch, one_by_one
from simgrad.theory.kernel.gram import PairKernel, gradients
from simgrad.theory.kernel.rules import between_sides, outer_products
from simgrad.theory.kernel.signals import collect
from simgrad.typing import Array, Theta

Method = Literal["auto", "ghost", "explicit", "plain"]


@functools.partial(jax.jit, static_argnames=("apply", "method"))
def pair_kernel_blocks(
    apply: Apply, theta: Theta, batch: Batch, method: Method = "auto"
) -> dict[str, PairKernel]:
    """:func:`pair_kernel` of each parameter leaf by path; leaves under ``layers/`` give (B, depth).

    >>> from simgrad.models import unconstrained_features
    >>> from simgrad.pairs import Pair, padded
    >>> pairs = [Pair([1, 2], [3], [4])]
    >>> batch, (apply, theta) = padded(pairs), unconstrained_features(pairs, 9, 4)
    >>> blocks = pair_kernel_blocks(apply, theta, batch)
    >>> list(blocks), bool(blocks["unembedding/table"].gap[0] < 0)  # W cannot push one token down
    (['features/table', 'unembedding/table'], True)
    """
    return _blocks(apply, theta, batch, method)[0]


def pair_kernel(apply: Apply, theta: Theta, batch: Batch, method: Method = "auto") -> PairKernel:
    """‖g_w‖², ⟨g_w,g_l⟩ and ‖g_l‖² of each pair, in nats² per unit of θ².

    Args:
        apply: the model; :func:`simgrad.models.only` selects parameters.
        theta: its parameters.
        batch: B pairs in either layout; long prompts are cheaper packed
            (:func:`simgrad.theory.kernel.cost.packing_pays`).
        method: ``plain`` takes two gradients a pair (any model, the reference). ``ghost`` takes one
            backward pass for the batch and no weight gradients, ``explicit`` the same with weight
            gradients one leaf at a time. ``auto`` is the cheaper of the last two for each leaf
            where the model allows (:mod:`simgrad.theory.kernel.cost`), else plain. Compiled once
            per model and batch shape.

    Raises:
        ValueError: nothing is trained; ``ghost`` without a transformer.

    Source: Yuan et al., arXiv 2410.13828, Sec. 3 (the gradient inner product condition).

    >>> from simgrad.models import ModelConfig, create
    >>> from simgrad.pairs import Pair, padded
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> kernel = pair_kernel(apply, theta, padded([Pair([1, 2], [3], [4, 5])]))
    >>> kernel.inner.shape, bool(kernel.cosine[0] ** 2 <= 1)
    ((1,), True)
    """
    return kernel_and_responses(apply, theta, batch, method)[0]


@functools.partial(jax.jit, static_argnames=("apply", "method"))
def kernel_and_responses(
    apply: Apply, theta: Theta, batch: Batch, method: Method = "auto"
) -> tuple[PairKernel, Responses]:
    """:func:`pair_kernel` together with the forward pass it needed anyway.

    >>> import jax.numpy as jnp
    >>> from simgrad.models import linear_softmax
    >>> from simgrad.pairs import Pair, padded
    >>> pairs = [Pair([1, 2], [3], [4, 5])]
    >>> batch, (apply, theta) = padded(pairs), linear_softmax(pairs, 9, 4)
    >>> kernel, result = kernel_and_responses(apply, theta, batch)
    >>> jnp.allclose(kernel.inner, head_kernel(result, batch).inner).item()  # W is all that learns
    True
    """
    blocks, result = _blocks(apply, theta, batch, method)
    flat = [jax.tree.map(lambda x: x.reshape(len(x), -1).sum(-1), k) for k in blocks.values()]
    return jax.tree.map(lambda *xs: jnp.stack(xs).sum(0), *flat), result


def _blocks(
    apply: Apply, theta: Theta, batch: Batch, method: Method
) -> tuple[dict[str, PairKernel], Responses]:
    bind(apply, theta)  # raises where nothing is trained
    if method not in get_args(Method):
        raise ValueError(f"method={method!r}: choose one of {', '.join(get_args(Method))}")
    tapped = isinstance(apply, TappedApply)
    if method == "plain" or (method == "auto" and not tapped):
        return _plain(apply, theta, batch), responses(apply, theta, batch)
    if not tapped:
        raise ValueError(
            f"method {method!r} needs a transformer; {type(apply).__name__} has method 'plain' only"
        )
    route = None if method == "auto" else method == "ghost"
    blocks, result = collect(apply, theta, batch, lambda g: between_sides(g, route))
    pairs_first = {  # what the layers' scan stacks has depth as first axis
        n: jax.tree.map(jnp.transpose, k) if tree.is_layered(n) else k for n, k in blocks.items()
    }
    return pairs_first, result


def _plain(apply: Apply, theta: Theta, batch: Batch) -> dict[str, PairKernel]:
    model = bind(apply, theta)
    paths = tree.names(model.trained)

    def one(pair: Batch) -> dict[str, PairKernel]:
        value, pullback = jax.vjp(lambda t: model.logp(t, pair)[0], model.trained)
        both = tree.pulled_back(pullback, jnp.eye(2, dtype=value.dtype))
        return {p: _leaf_kernel(p, g) for p, g in zip(paths, jax.tree.leaves(both), strict=True)}

    return one_by_one(one, batch)


def _leaf_kernel(path: str, g: Array) -> PairKernel:
    if tree.is_layered(path):
        return gradients(jnp.swapaxes(g, 0, 1))  # one kernel a layer
    return jax.tree.map(lambda x: x[0], gradients(g[None]))


def head_kernel(result: Responses, batch: Batch) -> PairKernel:
    """Exact kernel of an untied unembedding, from the forward pass alone.

    ⟨∇_W log π(y|x), ∇_W log π(y'|x)⟩ = Σ_{k,k'} ⟨h_k, h'_k'⟩ ⟨e_{y_k} - π_k, e_{y'_k'} - π'_k'⟩,
    accumulated in float32 or better. With every second factor set to 1 its gap ⟨g_w,g_l⟩ - ‖g_w‖²
    is the CHES score.

    >>> import jax.numpy as jnp
    >>> from simgrad.pairs import Pair, padded
    >>> h, logits = jnp.ones((1, 2, 1, 1)), jnp.zeros((1, 2, 1, 2))
    >>> result = Responses(jnp.zeros((1, 2, 1)), logits, h, h[:, :, 0])
    >>> kernel = head_kernel(result, padded([Pair([2], [0], [1])]))
    >>> kernel.sq_chosen.item(), kernel.inner.item()
    (0.5, -0.5)
    """
    error = prediction_error(result.logits, batch.targets, batch.valid)
    return outer_products(result.hidden, error)[0]
