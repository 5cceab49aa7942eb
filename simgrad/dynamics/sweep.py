"""Sweeps: every configuration with every seed, on all local devices, as one table."""

from __future__ import annotations

import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simgrad.dynamics.configs import RunConfig
from simgrad.dynamics.recipe import Recipe
from simgrad.dynamics.spread import spread_in_rounds
from simgrad.dynamics.sweep_table import SweepTable, labels
from simgrad.dynamics.training import advance, begin, policy, prepare
from simgrad.models import Apply, ContextApply, bind, only, sequence_logp
from simgrad.pairs import Batch
from simgrad.store import RowStore, identity, provenance
from simgrad.typing import Array, Theta


def sweep(
    apply: Apply,
    thetas: Theta,
    batches: Batch,
    configs: Sequence[RunConfig],
    *,
    seeds: Sequence[int],
    out: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    at_once: int | None = None,
) -> SweepTable:
    """Train every configuration from every seed's policy, as :func:`simgrad.dynamics.train` does.

    Runs are spread over all local devices. Configurations that differ only in their learning rate
    are one compiled program. Of a run only its row is kept, so memory does not grow with parameters
    times runs.

    Args:
        apply: the model.
        thetas: the policies at the start, which are the references too; the seeds on the leading
            axis.
        batches: each seed's pairs on the leading axis, or one batch for all.
        configs: from :func:`simgrad.dynamics.grid`, or any list.
        seeds: one a policy; each draws its own order of the pairs.
        out: .npz file that keeps finished runs: the same call continues from it and gives the same
            table.
        progress: called with (runs finished, runs in all).
        at_once: runs vectorised together on a device (None: 1 for a transformer on CPU, where
            vmapped backward passes are slow and in float32 can be wrong; else as many as fit).

    Raises:
        ValueError: shapes or numbers that do not fit, a configuration or seed that comes twice,
            ``out`` of another call.

    >>> from simgrad.dynamics import grid
    >>> from simgrad.models import linear_softmax
    >>> from simgrad.pairs import Pair, padded
    >>> pairs = [Pair([1, 2], [3], [4]), Pair([1], [6], [7])]
    >>> apply, theta = linear_softmax(pairs, 9, 4)
    >>> thetas = jax.tree.map(lambda x: np.stack([x, x]), theta)
    >>> configs = grid(learning_rate=[0.1, 0.2], optimizer="sgd")
    >>> found = sweep(apply, thetas, padded(pairs), configs, seeds=[0, 1])
    >>> found["learning_rate"].tolist(), found["seed"].tolist(), bool((found["margin"] > 0).all())
    ([0.1, 0.1, 0.2, 0.2], [0, 1, 0, 1], True)
    """
    configs, seeds = list(configs), [operator.index(seed) for seed in seeds]
    thetas, pairs = jax.tree.map(np.asarray, thetas), batches.tokens.shape[-3]
    groups = _groups(apply, thetas, batches, configs, seeds)
    arrays = {name: np.asarray(x) for name, x in vars(batches).items()}
    most = at_once or _at_once(apply, thetas)
    run = identity(
        "simgrad.dynamics.sweep",
        vectorised=(most, jax.local_device_count()),
        configs=[repr(config) for config in configs],
        seeds=seeds,
        model=apply,
        policies=thetas,
        pairs=arrays,
    )
    with RowStore(out, run, len(configs) * len(seeds)) as found:
        found.columns = labels(configs, seeds, pairs) | found.columns
        for common, members in groups.items():
            order = np.stack([common.recipe(seed).order(pairs) for seed in seeds])
            runs = np.concatenate([np.arange(len(seeds)) + c * len(seeds) for c in members])
            each = math.ceil(len(runs) / jax.local_device_count())
            size = math.ceil(each / math.ceil(each / most))
            todo = runs[~found.done[runs]]
            # whole groups only: what is vectorised together then does not depend on where a call
            # stopped
            fill = -len(todo) % (size * jax.local_device_count())
            todo = np.append(todo, np.repeat(todo[-1:], fill))
            if not len(todo):
                continue
            rates = np.array([configs[i // len(seeds)].learning_rate for i in todo])
            own = batches.tokens.ndim == 4
            stacked, shared = ((thetas, order, arrays), None) if own else ((thetas, order), arrays)
            inputs = jax.tree.map(functools.partial(_Rows, rows=todo % len(seeds)), stacked)
            program, at = _running(only(apply, *common.include or ()), common.recipe()), 0
            for results in spread_in_rounds(
                program, rates, *inputs, shared=shared, at_once=size, rounds=1
            ):
                found.add(todo[at : at + len(results["diverged"])], results)
                at += len(results["diverged"])
                if progress is not None:
                    progress(int(found.done.sum()), len(found.done))
        if out is not None and not Path(out).exists():
            found.keep()
        return SweepTable.of(found.columns, {"run": run, "provenance": provenance()})


def _groups(
    apply: Apply, thetas: Theta, batches: Batch, configs: list[RunConfig], seeds: list[int]
) -> dict[RunConfig, list[int]]:
    """Configurations by what they share but for the learning rate; refuses whatever cannot run."""
    every: dict[str, list[Any]] = {"configs": configs, "seeds": seeds}
    for name, values in every.items():
        if not values:
            raise ValueError(f"no {name}: give at least one")
        if twice := [x for x, count in Counter(values).items() if count > 1]:
            raise ValueError(f"{name} holds {twice[0]} twice")
    lengths = {len(x) for x in jax.tree.leaves(thetas)}
    if lengths != {len(seeds)}:
        raise ValueError(
            f"{len(seeds)} seeds, but thetas has leading axes {sorted(lengths)}: stack one policy "
            "a seed"
        )
    if batches.tokens.ndim == 4 and len(batches.tokens) != len(seeds):
        raise ValueError(
            f"{len(seeds)} seeds, but {len(batches.tokens)} batches: stack one a seed, or give one "
            "for all"
        )
    found: dict[RunConfig, list[int]] = {}
    for i, config in enumerate(configs):
        config.recipe().order(batches.tokens.shape[-3])
        bind(only(apply, *config.include or ()), thetas)
        found.setdefault(replace(config, learning_rate=1.0), []).append(i)
    return found


def _at_once(apply: Apply, thetas: Theta) -> int:
    """How many runs to vectorise: one for transformers on CPU, else some, of about 1 GiB in all."""
    cpu = jax.default_backend() == "cpu"
    if cpu and not isinstance(apply, ContextApply):
        return 1
    each = sum(x[0].nbytes for x in jax.tree.leaves(thetas))
    return max(1, min(256 if cpu else 64, 2**30 // (4 * each)))


@functools.lru_cache(maxsize=32)
def _running(apply: Apply, recipe: Recipe) -> Any:
    def run(rate: Array, theta: Theta, order: Array, arrays: dict[str, Array]) -> dict[str, Array]:
        batch = Batch(**arrays)
        data = prepare(apply, theta, batch, recipe)
        state = begin(apply, theta, recipe)
        usual = optax.tree.get(state.optimizer, "learning_rate")
        inner = optax.tree.set(state.optimizer, learning_rate=rate.astype(usual.dtype))
        state = replace(state, optimizer=inner)
        state = advance(apply, theta, recipe, data, state, order, recipe.steps)
        after = policy(bind(apply, theta), state.learned)
        change = sequence_logp(apply, after, batch) - data.reference
        good = jnp.append(jnp.isfinite(state.losses), jnp.isfinite(change).all())
        bad = ~good.all()
        return {
            "change": jnp.where(bad, jnp.nan, change),
            "first_loss": state.losses[0],
            "last_loss": jnp.where(bad, jnp.nan, state.losses[-1]),
            "diverged": jnp.where(bad, good.argmin(), -1),
        }

    return run


@dataclass(frozen=True)
class _Rows:
    """Rows of an array, gathered only when they are asked for."""

    array: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return self.array[self.rows[index]]
