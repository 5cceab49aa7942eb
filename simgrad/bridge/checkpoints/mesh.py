"""One policy on many devices: parameters split over a mesh's model axis, pairs over its data axis.

Arrays are placed and XLA's partitioner does the rest: the functions of :mod:`simgrad.theory` are
the same on one device and on many. In a run of many processes the mesh spans the devices of all of
them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from simgrad import tree
from simgrad.errors import InputError
from simgrad.models import ModelConfig
from simgrad.pairs import Batch, Pair
from simgrad.typing import Array, Theta

_DATA, MODEL = "data", "model"
"""Names of the axes."""

# linear maps whose outputs are split, and those that read these, split by their inputs
_OUTPUT, _INPUT = ("query", "key", "value", "up", "gate"), ("output", "down")


def device_mesh(data: int = 1, model: int = 1) -> Mesh:
    """All devices, of all processes, as a mesh of ``data`` x ``model``.

    Every device of the data axis scores pairs of its own; the devices of the model axis hold a part
    of every matrix each, and work on the same pairs. Neighbours along the model axis are devices of
    one process where it has enough.

    >>> device_mesh().axis_names
    ('data', 'model')

    Raises:
        InputError: sizes below 1, or a mesh that is not of as many devices as there are.
    """
    if min(data, model) < 1:
        raise InputError(f"mesh data={data},model={model}: both axes must be at least 1")
    there = jax.device_count()
    if data * model != there:
        kind, n = jax.devices()[0].platform, data * model
        remedy = (
            f"split the CPU with XLA_FLAGS=--xla_force_host_platform_device_count={n}, before JAX "
            "starts"
            if kind == "cpu"
            else f"choose axes whose product is {there}, or hide devices (CUDA_VISIBLE_DEVICES)"
        )
        if (count := jax.process_count()) > 1:
            remedy = f"the {count} processes must have {n} together"
        raise InputError(
            f"mesh data={data},model={model} takes {n} devices, but JAX has {there} ({kind}): "
            f"{remedy}"
        )
    return jax.make_mesh((data, model), (_DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def spec(path: str, config: ModelConfig, model: int) -> PartitionSpec:
    """How the parameter at ``path`` is split in ``model`` parts.

    Query, key, value, gate and up by output feature, attention output and down by input feature,
    tables of the vocabulary by token. Heads are never cut: where their number (of key and value
    heads for key and value), the width of the MLP or the vocabulary is no multiple of ``model``,
    the parameter is whole on every device, except that vocabularies are then split by feature if
    those divide. Norms, positions and biases of what is split by input are whole, and layers are
    never dealt out.

    >>> config = ModelConfig(vocab_size=50257, width=768, heads=12, kv_heads=3)
    >>> [spec(f"layers/attention/{name}/kernel", config, 2) for name in ("query", "key")]
    [P(None, None, 'model'), P()]
    >>> spec("embedding/table", config, 2)
    P(None, 'model')
    """
    *_, site, leaf = path.split("/")
    if site in ("embedding", "unembedding"):
        axis = next(
            (k for k, n in enumerate((config.vocab_size, config.width)) if n % model == 0), None
        )
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, MODEL)
    units = {
        "query": config.heads,
        "key": config.n_kv_heads,
        "value": config.n_kv_heads,
        "output": config.heads,
    }
    if site not in _OUTPUT + _INPUT or units.get(site, config.mlp_features) % model:
        return PartitionSpec()
    before = [None] * tree.is_layered(path)
    if leaf == "bias":
        return PartitionSpec(*before, MODEL) if site in _OUTPUT else PartitionSpec()
    return PartitionSpec(*before, None, MODEL) if site in _OUTPUT else PartitionSpec(*before, MODEL)


def split_array(
    shape: tuple[int, ...], sharding: NamedSharding, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> Array:
    """An array of which ``read`` gives the part at an index, asked for each part once.

    The host holds one part beside what the devices hold; of many processes, each reads the parts of
    its own devices.
    """
    devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(n)[:2] for part, n in zip(index or (), shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    parts: list[Array] = []
    for bounds, some in devices.items():
        part = read(tuple(slice(*pair) for pair in bounds))
        parts += jax.block_until_ready([jax.device_put(part, device) for device in some])
        del part
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def placed(theta: Theta, config: ModelConfig, mesh: Mesh) -> Theta:
    """Parameters that every process holds, split over the mesh as :func:`spec` says.

    >>> from simgrad.models import create
    >>> config = ModelConfig(vocab_size=9, width=8, heads=2)
    >>> mesh_of(placed(create(config)[1], config, device_mesh())).axis_names
    ('data', 'model')
    """

    def place(path: str, x: Array) -> Array:
        sharding, host = NamedSharding(mesh, spec(path, config, mesh.shape[MODEL])), np.asarray(x)
        return split_array(host.shape, sharding, lambda index: host[index])

    parts = [place(path, x) for path, x in tree.by_name(theta).items()]
    return jax.tree.structure(theta).unflatten(parts)


def mesh_of(theta: Theta) -> Mesh | None:
    """The mesh of :func:`device_mesh` on which parameters lie, if they do."""
    for leaf in jax.tree.leaves(theta):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == (_DATA, MODEL):
            return sharding.mesh if isinstance(sharding.mesh, Mesh) else None
    return None


def groups(mesh: Mesh | None) -> int:
    """How many groups of devices work on pairs of their own: the size of the data axis."""
    return 1 if mesh is None else mesh.shape[_DATA]


def mesh_name(theta: Theta) -> str | None:
    """``data=2,model=2``, or None for one device: what makes sums differ in their last digits."""
    mesh = mesh_of(theta)
    return (
        None
        if mesh is None or mesh.size == 1
        else ",".join(f"{name}={n}" for name, n in mesh.shape.items())
    )


def fill(pairs: Sequence[Pair], mesh: Mesh | None) -> list[Pair]:
    """The pairs, the last one repeated until every device of the data axis has equally many."""
    return [*pairs, *[pairs[-1]] * (-len(pairs) % groups(mesh))]


def split(batch: Batch, mesh: Mesh | None) -> Batch:
    """A batch with its pairs dealt out over the data axis, which must divide their number."""
    return batch if mesh is None else _dealt(batch, NamedSharding(mesh, PartitionSpec(_DATA)))


def whole(batch: Batch, mesh: Mesh | None) -> Batch:
    """A batch that every device holds."""
    return batch if mesh is None else _dealt(batch, NamedSharding(mesh, PartitionSpec()))


def _dealt(batch: Batch, sharding: NamedSharding) -> Batch:
    def deal(x: Array) -> Array:
        host = np.asarray(x)
        return split_array(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(deal, batch)


def replicated(columns: dict[str, Array], mesh: Mesh | None) -> dict[str, Array]:
    """The same arrays, whole on every device, so that every process can read them."""
    if mesh is None:
        return columns
    return _replication(mesh)(columns)


@functools.lru_cache(maxsize=8)
def _replication(mesh: Mesh) -> Callable[[dict[str, Array]], dict[str, Array]]:
    return jax.jit(lambda columns: columns, out_shardings=NamedSharding(mesh, PartitionSpec()))
