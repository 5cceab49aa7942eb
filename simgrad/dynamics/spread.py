"""Many independent runs on all local devices at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec


def spread(
    run: Callable[..., Any], *inputs: Any, shared: Any = None, at_once: int = 1, rounds: int = 8
) -> Any:
    """``run`` for every index of the inputs' leading axis, spread over all local devices.

    Results are stacked on the host.

    Each device works through its share, ``at_once`` runs at a time (1 is best for transformers on
    CPU, where vmapped backward passes are slow, and in float32 can be wrong; large values suit
    accelerators and linear models). Memory is bounded by ``rounds`` · ``at_once`` runs a device:
    results leave it after every round.

    Args:
        run: a pure function of one run's inputs (and of ``shared``, as last argument, if it is
            given).
        *inputs: trees of arrays with the runs on their leading axis.
        shared: what all runs read.
        at_once: runs vectorised together on one device.
        rounds: groups of runs a device is given before results are fetched.

    Raises:
        ValueError: inputs of different lengths, or none.

    >>> import jax.numpy as jnp
    >>> spread(lambda x: x**2, jnp.arange(5.0)).tolist()
    [0.0, 1.0, 4.0, 9.0, 16.0]
    """
    pieces = list(spread_in_rounds(run, *inputs, shared=shared, at_once=at_once, rounds=rounds))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *pieces)


def spread_in_rounds(
    run: Callable[..., Any], *inputs: Any, shared: Any = None, at_once: int = 1, rounds: int = 8
) -> Iterator[Any]:
    """:func:`spread`, one round's results after the other, in order."""
    lengths = {len(x) for x in jax.tree.leaves(inputs)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"inputs must have one common leading length of at least 1, got {sorted(lengths)}"
        )
    (count,) = lengths
    devices = min(jax.local_device_count(), count)
    each = min(math.ceil(count / devices), rounds * at_once)
    step = _program(run, devices, at_once, shared is not None)
    size = each * devices
    for start in range(0, count, size):
        index = np.minimum(np.arange(start, start + size), count - 1)
        some = jax.tree.map(lambda x, index=index: x[index], inputs)
        found = step(shared, *some) if shared is not None else step(*some)
        yield jax.tree.map(lambda x, left=count - start: np.asarray(x)[:left], found)


@functools.lru_cache(maxsize=32)
def _program(
    run: Callable[..., Any], devices: int, at_once: int, shared: bool
) -> Callable[..., Any]:
    mesh = Mesh(np.array(jax.local_devices()[:devices]), ("runs",), axis_types=(AxisType.Auto,))
    runs, all_alike = PartitionSpec("runs"), PartitionSpec()

    def share(*args: Any) -> Any:
        common, inputs = ((args[0],), args[1:]) if shared else ((), args)

        def one(x: tuple) -> Any:
            return run(*x, *common)

        return jax.lax.map(one, inputs, batch_size=at_once if at_once > 1 else None)

    def specs(*args: Any) -> tuple:
        return (all_alike, *[runs] * (len(args) - 1)) if shared else (runs,) * len(args)

    @jax.jit
    def program(*args: Any) -> Any:
        mapped = jax.shard_map(
            share, mesh=mesh, in_specs=specs(*args), out_specs=runs, check_vma=False
        )
        return mapped(*args)

    return program
