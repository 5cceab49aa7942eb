"""What a training run recorded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simgrad.objectives import Coefficients
from simgrad.store import load_arrays, save_arrays
from simgrad.theory import PairKernel, regime
from simgrad.typing import Array, Float, Int

__all__ = ["Trace"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "steps",
        "losses",
        "reference",
        "logp",
        "token_logp",
        "coefficients",
        "kernel",
        "probes",
        "watched",
        "token_weights",
    ],
    meta_fields=["config"],
)
@dataclass(frozen=True)
class Trace:
    """Records of a run, at E chosen steps; log-probs in nats, the axis of length 2 is (chosen, rejected).

    Attributes:
        steps: updates taken at each record; the first is 0.
        losses: mean loss of every step's batch, before its update.
        reference: log π_ref of the pairs.
        logp: log π of the pairs.
        token_logp: log π(y_k | x, y_<k) of every response token, 0 where padded.
        coefficients: the objective's d_w and d_l of each pair (before any mitigation).
        kernel: ‖g_w‖², ⟨g_w,g_l⟩, ‖g_l‖² of each pair over the trained parameters (None unless
            asked for).
        probes: log π of the probe pairs.
        watched: log π(z | prompt) of every token z after the watched prompts.
        token_weights: learned weights of the response tokens (None without a mask).
        config: how the run was made, as plain values.
    """

    steps: Int[Array, " E"]
    losses: Float[Array, " S"]
    reference: Float[Array, "B 2"]
    logp: Float[Array, "E B 2"]
    token_logp: Float[Array, "E B 2 R"]
    coefficients: Coefficients
    kernel: PairKernel | None
    probes: Float[Array, "E P 2"]
    watched: Float[Array, "E N V"]
    token_weights: Float[Array, "E B 2 R"] | None
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def change(self) -> Float[Array, "E B 2"]:
        """Δlog π of the pairs since the start."""
        return self.logp - self.logp[:1]

    @property
    def margin(self) -> Float[Array, "E B"]:
        """The margin m = Δ_w - Δ_l against the reference."""
        delta = self.logp - self.reference[None]
        return delta[..., 0] - delta[..., 1]

    @property
    def regime(self) -> Int[Array, "E B"]:
        """Each pair's first-order regime when trained alone, from its own kernel: :func:`simgrad.theory.regime`.

        Raises:
            ValueError: the run recorded no kernels.
        """
        if self.kernel is None:
            raise ValueError("this run recorded no kernels: train(..., kernels=True)")
        return regime(self.kernel, self.coefficients)

    def save(self, path: str | Path) -> None:
        """Write an .npz file, configuration included, at once."""
        arrays = {"/".join(path): leaf for path, leaf in _named(self)}
        save_arrays(path, arrays, {"kind": "trace", "config": dict(self.config)})

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what :meth:`save` (or ``train(..., out=)``) wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a trace.
        """
        arrays, header = load_arrays(path)
        if header.get("kind") not in ("trace", "training"):
            raise ValueError(f"{path} holds no trace")
        prefix = "trace/" if header["kind"] == "training" else ""
        return from_arrays(
            {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}, header
        )


def _named(trace: Trace) -> list[tuple[tuple[str, ...], Array]]:
    found = []
    for f in dataclasses.fields(trace):
        value = getattr(trace, f.name)
        if f.name == "config" or value is None:
            continue
        if isinstance(value, Coefficients | PairKernel):
            found += [((f.name, g.name), getattr(value, g.name)) for g in dataclasses.fields(value)]
        else:
            found.append(((f.name,), value))
    return found


def to_arrays(trace: Trace, prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays of a trace by name."""
    return {prefix + "/".join(path): np.asarray(leaf) for path, leaf in _named(trace)}


def from_arrays(arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> Trace:
    """Undo :func:`to_arrays`."""
    kinds: dict[str, type] = {"coefficients": Coefficients, "kernel": PairKernel}
    values: dict[str, Any] = {
        "config": header.get("config", {}),
        "kernel": None,
        "token_weights": None,
    }
    for name, array in arrays.items():
        first, _, second = name.partition("/")
        if second:
            values[first] = {**(values.get(first) or {}), second: jnp.asarray(array)}
        else:
            values[first] = jnp.asarray(array)
    for name, kind in kinds.items():
        if values[name] is not None:
            values[name] = kind(**values[name])
    return Trace(**values)
