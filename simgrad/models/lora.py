"""Low-rank adapters on named matrices of any model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import jax
import jax.numpy as jnp

from simgrad import tree
from simgrad.models.output import Apply, Inputs, Output
from simgrad.typing import Array, Float, Theta


@dataclass(frozen=True)
class LoraApply(Apply):
    """``apply`` with adapters: theta = {"base": frozen parameters, "lora": {path: {"a", "b"}}}.

    A matrix W (inputs first) acts as W + scale · A B; see :func:`add_lora`.
    """

    base: Apply
    scale: float
    trainable: tuple[str, ...] = ("!base/*",)

    def read(self, theta: Theta, inputs: Inputs) -> Output:
        """The base model's output at the merged parameters."""
        return self.base.read(merge_lora(self, theta), inputs)

    def readout(self, theta: Theta, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """The base model's, which adapters leave alone."""
        return self.base.readout(theta["base"], hidden)


def add_lora(
    apply: Apply,
    theta: Theta,
    targets: Sequence[str],
    rank: int = 8,
    alpha: float = 16.0,
    seed: int = 0,
) -> tuple[LoraApply, Theta]:
    """Adapters W + (α/r) A B on linear maps whose path matches ``targets``, with a frozen base.

    With inputs first, W is (I, O), A is (I, r) and B is (r, O); matrices stacked over layers get
    one adapter a layer. A ~ N(0, 1/I) and B = 0, so the model starts unchanged and at first only B
    has a gradient (Hu et al., arXiv 2106.09685, Sec. 4.1, where inputs come last: their A, B are
    Aᵀ, Bᵀ here). r = 8 and α = 16 are common choices, not the paper's.

    With G = ∇_W log π the adapter's kernel is a projection of W's: (α/r)² (⟨G_w Bᵀ, G_l Bᵀ⟩ + ⟨Aᵀ
    G_w, Aᵀ G_l⟩).

    >>> from simgrad import tree
    >>> from simgrad.models import ModelConfig, create
    >>> apply, theta = create(ModelConfig(vocab_size=9, width=8, depth=2, heads=2))
    >>> adapted, theta = add_lora(apply, theta, ["layers/attention/query/kernel"], rank=2)
    >>> {path: pair["a"].shape for path, pair in theta["lora"].items()}
    {'layers/attention/query/kernel': (2, 8, 2)}

    Raises:
        ValueError: a target matches no linear map (tables have no adapters), or the rank is not
            positive.
    """
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets takes a list of one or more patterns, got {targets!r}")
    if rank < 1:
        raise ValueError(f"rank must be positive, got {rank}")
    leaves = tree.by_name(theta)
    matrices = [name for name in leaves if name.endswith("/kernel")]
    for target in targets:
        if not any(fnmatch(name, target) for name in matrices):
            raise ValueError(f"no matrix matches {target!r}; there are: {', '.join(matrices)}")
    key = jax.random.key(seed)
    adapters = {}
    for i, name in enumerate(m for m in matrices if tree.selected(m, targets)):
        *stack, fan_in, out = leaves[name].shape
        wide = tree.accumulator(leaves[name].dtype)
        a = jax.random.normal(jax.random.fold_in(key, i), (*stack, fan_in, rank), wide) / math.sqrt(
            fan_in
        )
        adapters[name] = {
            "a": a.astype(leaves[name].dtype),
            "b": jnp.zeros((*stack, rank, out), leaves[name].dtype),
        }
    return LoraApply(apply, alpha / rank), {"base": theta, "lora": adapters}


def merge_lora(apply: LoraApply, theta: Theta) -> Theta:
    """Parameters of the base model with the adapters added in.

    >>> import jax.numpy as jnp
    >>> from simgrad.models import ModelConfig, create
    >>> apply, _ = create(ModelConfig(vocab_size=9, width=8, depth=1, heads=2))
    >>> pair = {"a": jnp.array([[1.0], [0.0]]), "b": jnp.array([[0.0, 3.0]])}
    >>> theta = {"base": {"w": jnp.eye(2)}, "lora": {"w": pair}}
    >>> merge_lora(LoraApply(apply, 2.0), theta)["w"].tolist()
    [[1.0, 6.0], [0.0, 1.0]]
    """
    merged = []
    for name, leaf in tree.by_name(theta["base"]).items():
        if name in theta["lora"]:
            a, b = theta["lora"][name]["a"], theta["lora"][name]["b"]
            leaf = leaf + jnp.asarray(apply.scale, leaf.dtype) * jnp.matmul(
                a, b, precision="highest"
            )
        merged.append(leaf)
    return jax.tree.structure(theta["base"]).unflatten(merged)
