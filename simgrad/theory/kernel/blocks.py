"""Kernels grouped by parameter block: which layers and kinds of matrix hold entanglement."""

from __future__ import annotations

from typing import TypeVar

import jax

from simgrad.tree import is_layered

Block = TypeVar("Block")


def _add(groups: dict[str, Block], name: str, block: Block) -> None:
    groups[name] = (
        jax.tree.map(lambda x, y: x + y, groups[name], block) if name in groups else block
    )


def by_layer(blocks: dict[str, Block]) -> dict[str, Block]:
    """One kernel a layer (``layer 0``, ``layer 1``, …), others by module (``embedding``, …).

    Takes the result of :func:`simgrad.theory.kernel.pair_kernel_blocks` or
    :func:`simgrad.theory.kernel.entanglement_blocks`, whose leaves under ``layers/`` have depth as
    last axis.

    >>> import jax.numpy as jnp
    >>> one, two = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])
    >>> blocks = {"layers/mlp/kernel": one, "layers/norm/scale": two}
    >>> {name: block.tolist() for name, block in by_layer(blocks).items()}
    {'layer 0': [4.0], 'layer 1': [6.0]}
    """
    groups: dict[str, Block] = {}
    for path, block in blocks.items():
        if is_layered(path):
            for layer in range(jax.tree.leaves(block)[0].shape[-1]):
                _add(
                    groups,
                    f"layer {layer}",
                    jax.tree.map(lambda x, layer=layer: x[..., layer], block),
                )
        else:
            _add(groups, path.split("/")[0], block)
    return groups


def by_matrix(blocks: dict[str, Block]) -> dict[str, Block]:
    """One kernel a kind of matrix, summed over layers (``attention/query``, ``mlp/up``, …).

    >>> import jax.numpy as jnp
    >>> one, two = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])
    >>> blocks = {"layers/mlp/up/kernel": one, "layers/mlp/up/bias": two}
    >>> {name: block.tolist() for name, block in by_matrix(blocks).items()}
    {'mlp/up': [10.0]}
    """
    groups: dict[str, Block] = {}
    for path, block in blocks.items():
        name = "/".join(part for part in path.split("/")[:-1] if part != "layers")
        _add(groups, name, jax.tree.map(lambda x: x.sum(-1), block) if is_layered(path) else block)
    return groups
