"""What a pair kernel costs, from shapes alone, and the route that costs least.

With N sequences of T positions a batch of one pair costs, in floating-point operations,

==============  ==============================================================================
forward         2 N T I O a linear map, 4 N T² A an attention (A = heads x features),
                2 · 2R D V the readout
backward        J times the linear maps again (no weight gradients), J times 10 N T² A an
                attention whose weights are computed again, and 2 · 2R D V
contraction     the cheaper of two exact routes for each input and the maps that read it, below
==============  ==============================================================================

Two padded sequences have N = 2, T = P + R and J = 1 cotangent: each side carries its own. One
packed sequence has N = 1, T = P + 2R and J = 2: the prompt is read once, and both sides meet the
same inputs. The routes:

==============  =====================================  =========================================
                padded                                 packed
==============  =====================================  =========================================
ghost           2 · 3 T² (I + ΣO)                      2 T² (I + 2 ΣO), inputs shared
explicit        2 · 2 T I ΣO                           2 · 2 T I ΣO
==============  =====================================  =========================================

so packing pays for prompts of about twice a response's length and more. Norms, activations and data
movement are left out; ``simgrad bench --only routes`` compares with what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from simgrad import tree
from simgrad.models import Inputs, TappedApply
from simgrad.typing import Array, Theta


@dataclass(frozen=True)
class KernelFlops:
    """Floating-point operations of one pair's kernel; a multiply-add counts twice.

    >>> KernelFlops(2, 2, 1).total
    5
    """

    forward: int
    backward: int
    contraction: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.forward + self.backward + self.contraction


def route_flops(tokens: int, fan_in: int, out: int, shared: bool = False) -> tuple[int, int]:
    """Cost of a pair's inner products for maps of one input to ``out`` numbers: (ghost, explicit).

    ``shared`` says that both sides have the same inputs, as in the packed layout.

    >>> route_flops(10, 4, 8), route_flops(10, 4, 8, shared=True)
    ((7200, 1280), (4000, 1280))
    """
    ghost = tokens**2 * (fan_in + 2 * out) if shared else 3 * tokens**2 * (fan_in + out)
    return 2 * ghost, 2 * 2 * tokens * fan_in * out


def ghost_is_cheaper(tokens: int, fan_in: int, out: int, shared: bool = False) -> bool:
    """Whether contracting over tokens costs less than forming both gradients.

    >>> cases = ((100, False), (400, False), (400, True))
    >>> [ghost_is_cheaper(tokens, 768, 768, shared) for tokens, shared in cases]
    [True, False, True]
    """
    ghost, explicit = route_flops(tokens, fan_in, out, shared)
    return ghost < explicit


@dataclass(frozen=True)
class Reading:
    """Linear maps that read one input, in every layer: query, key and value, for example.

    Attributes:
        layers: how often they are there.
        fan_in: I.
        out: ΣO.
        mixed: features that attention mixes over positions with what they put out, 0 if none.
    """

    layers: int
    fan_in: int
    out: int
    mixed: int


@dataclass(frozen=True)
class Shapes:
    """All a cost depends on besides lengths; ``itemsize`` is the bytes of one activation.

    >>> from simgrad.models import ModelConfig, create
    >>> Shapes.of(*create(ModelConfig(vocab_size=9, width=8, depth=3, heads=2))).readings[1]
    Reading(layers=3, fan_in=8, out=24, mixed=8)
    """

    readings: tuple[Reading, ...]
    width: int
    vocab_size: int
    itemsize: int

    @classmethod
    def of(cls, apply: TappedApply, theta: Theta) -> Shapes:
        """Of a model, found without computing anything."""
        ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)

        def arrays(theta: Theta, ids: Array) -> tuple[dict[tuple[str, ...], tuple], Array, Array]:
            output = apply.record(theta, Inputs(ids, ids, ids, ids))
            linear = {
                use.sites: (use.input, use.outputs)
                for use in output.uses.values()
                if use.kind == "linear"
            }
            return linear, output.hidden, output.logits

        linear, hidden, logits = jax.eval_shape(arrays, theta, ids)
        readings = []
        for sites, (x, outputs) in linear.items():
            outs = {site: y.shape[-1] for site, y in zip(sites, outputs, strict=True)}
            layers = x.shape[0] if tree.is_layered(sites[0]) else 1
            readings.append(
                Reading(
                    layers, x.shape[-1], sum(outs.values()), outs.get("layers/attention/query", 0)
                )
            )
        return cls(tuple(readings), hidden.shape[-1], logits.shape[-1], hidden.dtype.itemsize)


def kernel_flops(
    shapes: Shapes, length: int, rows: int, packed: bool, ghost: bool | None = None
) -> KernelFlops:
    """Cost of one pair's kernel over all parameters, by sequence and response length.

    T = ``length`` positions a sequence, R = ``rows`` a response.

    ``ghost`` forces a route.

    >>> from simgrad.models import ModelConfig, create
    >>> shapes = Shapes.of(*create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2)))
    >>> packed, padded = kernel_flops(shapes, 68, 4, True), kernel_flops(shapes, 64, 4, False)
    >>> packed.total < padded.total
    True
    """
    sequences = 1 if packed else 2
    pick = min if ghost is None else lambda routes: routes[0 if ghost else 1]
    forward = backward = 2 * 2 * rows * shapes.width * shapes.vocab_size
    contraction = pick(route_flops(rows, shapes.width, shapes.vocab_size))
    for r in shapes.readings:
        maps = r.layers * 2 * sequences * length * r.fan_in * r.out
        mixing = r.layers * sequences * length**2 * r.mixed
        forward += maps + 4 * mixing
        backward += (2 // sequences) * (maps + 10 * mixing)
        contraction += r.layers * pick(route_flops(length, r.fan_in, r.out, packed))
    return KernelFlops(forward, backward, contraction)


def packing_pays(shapes: Shapes, prompt: int, chosen: int, rejected: int) -> bool:
    """Whether a pair of such lengths is cheaper on one packed sequence than on two padded ones.

    >>> from simgrad.models import ModelConfig, create
    >>> shapes = Shapes.of(*create(ModelConfig(vocab_size=99, width=64, depth=2)))
    >>> packing_pays(shapes, 128, 8, 6), packing_pays(shapes, 8, 128, 128)
    (True, False)
    """
    rows = max(chosen, rejected)
    packed = kernel_flops(shapes, prompt + chosen + rejected, rows, packed=True)
    return packed.total < kernel_flops(shapes, prompt + rows, rows, packed=False).total


def token_flops(shapes: Shapes, length: int, rows: int) -> int:
    """Cost of one pair's token kernel on two padded sequences.

    There is one backward pass a row, and all rows are contracted.

    Each map contracts three blocks (w, w), (w, l), (l, l): 2 T² R O for (a a'ᵀ) δ', 2 T R² O for
    its products with δ.

    >>> shapes = Shapes((Reading(1, 8, 8, 0),), width=8, vocab_size=9, itemsize=4)
    >>> token_flops(shapes, length=4, rows=2)
    8096
    """
    pair = kernel_flops(shapes, length, rows, packed=False)
    readout = 2 * 2 * rows * shapes.width * shapes.vocab_size
    met = sum(
        r.layers
        * (2 * (2 * length) ** 2 * r.fan_in + 3 * 2 * length * rows * (length + rows) * r.out)
        for r in shapes.readings
    )
    everywhere = 2 * (2 * rows) ** 2 * (shapes.width + shapes.vocab_size)
    return pair.forward + readout + rows * (pair.backward - readout) + met + everywhere
