"""The cost formula against the operations that XLA counts in the compiled programs."""

import itertools

import jax
import pytest

from simgrad.models import ModelConfig, create
from simgrad.pairs import Pair, packed, padded
from simgrad.theory import pair_kernel, token_kernel
from simgrad.theory.kernel.cost import Shapes, kernel_flops, packing_pays, token_flops

ROUTES = list(itertools.product((padded, packed), ("ghost", "explicit")))


@pytest.fixture(scope="module")
def one_layer():
    """XLA counts the body of a loop over layers once."""
    apply, theta = create(
        ModelConfig(vocab_size=32, width=64, depth=1, heads=4, max_length=128, dtype="float32")
    )
    return apply, theta, Shapes.of(apply, theta)


def counted(f, theta):
    return jax.jit(f).lower(theta).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("lengths", [(64, 8), (8, 16)])
def test_what_the_formula_calls_cheapest_is_what_xla_counts_least_for(one_layer, lengths):
    apply, theta, shapes = one_layer
    prompt, response = lengths
    pairs = [Pair([1] * prompt, [2] * response, [3] * response)]
    predicted, found = {}, {}
    for layout, method in ROUTES:
        batch, name = layout(pairs), (layout.__name__, method)
        cost = kernel_flops(
            shapes, batch.tokens.shape[-1], response, layout is packed, method == "ghost"
        )
        predicted[name] = cost.total
        found[name] = counted(
            lambda theta, b=batch, m=method: pair_kernel(apply, theta, b, method=m), theta
        )
        assert (
            predicted[name] < found[name] < 1.2 * predicted[name]
        )  # the rest is norms and activations
    assert min(predicted, key=predicted.get) == min(found, key=found.get)
    layout = packed if packing_pays(shapes, prompt, response, response) else padded
    automatic = counted(lambda theta: pair_kernel(apply, theta, layout(pairs)), theta)
    assert automatic <= min(found.values())  # the route is chosen map by map


def test_token_kernels(one_layer):
    apply, theta, shapes = one_layer
    batch = padded([Pair([1] * 30, [2] * 6, [3] * 6)])
    found = counted(lambda theta: token_kernel(apply, theta, batch), theta)
    assert 1 < found / token_flops(shapes, batch.tokens.shape[-1], 6) < 1.25
