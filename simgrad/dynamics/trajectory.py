"""What a run recorded."""

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

from simgrad.store import load_arrays, save_arrays
from simgrad.theory import PairKernel, first_order, regime
from simgrad.typing import Array, Float, Int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields="steps losses reference logp probes token_logp force kernel watched "
    "token_weights".split(),
    meta_fields=["config"],
)
@dataclass(frozen=True)
class Trajectory:
    """Records of a run, at E chosen steps; log-probs in nats, the axis of 2 is (chosen, rejected).

    What a kind of run does not record is None.

    Attributes:
        steps: updates taken at each record; the first is 0.
        losses: mean loss of every step's batch, before its update.
        reference: log π_ref of the pairs.
        logp: log π of the pairs.
        probes: log π of the probe pairs; of a kernel flow, Δlog π of each probe since the start.
        token_logp: log π(y_k | x, y_<k) of every response token, 0 where padded.
        force: the objective's (d_w, -d_l) of each pair (before any mitigation).
        kernel: ‖g_w‖², ⟨g_w,g_l⟩, ‖g_l‖² of each pair over the trained parameters.
        watched: log π(z | prompt) of every token z after the watched prompts.
        token_weights: learned weights of the response tokens.
        config: how the run was made, as plain values.
    """

    steps: Int[Array, " E"]
    losses: Float[Array, " S"]
    reference: Float[Array, "B 2"]
    logp: Float[Array, "E B 2"]
    probes: Float[Array, "E *probes"]
    token_logp: Float[Array, "E B 2 R"] | None = None
    force: Float[Array, "E B 2"] | None = None
    kernel: PairKernel | None = None
    watched: Float[Array, "E N V"] | None = None
    token_weights: Float[Array, "E B 2 R"] | None = None
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
        """Each pair's first-order regime when trained alone: :func:`simgrad.theory.regime`.

        Raises:
            ValueError: the run recorded no kernels.
        """
        if self.kernel is None or self.force is None:
            raise ValueError("this run recorded no kernels: train(..., kernels=True)")
        return regime(first_order(self.kernel, self.force))

    def save(self, path: str | Path) -> None:
        """Write an .npz file, configuration included, at once."""
        save_arrays(path, to_arrays(self), {"kind": "trajectory", "config": dict(self.config)})

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Read what :meth:`save` (or ``train(..., out=)``) wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a trajectory.
        """
        arrays, header = load_arrays(path)
        if header.get("kind") not in ("trajectory", "training"):
            raise ValueError(f"{path} holds no trajectory")
        return from_arrays(arrays, header)


def to_arrays(trajectory: Trajectory) -> dict[str, np.ndarray]:
    """Arrays of a trajectory by name; those of the kernel as ``kernel/inner``."""
    found = {}
    for f in dataclasses.fields(trajectory):
        value = getattr(trajectory, f.name)
        if f.name == "config" or value is None:
            continue
        parts = {f.name: value}
        if isinstance(value, PairKernel):
            parts = {f"kernel/{name}": x for name, x in vars(value).items()}
        found |= {name: np.asarray(x) for name, x in parts.items()}
    return found


def from_arrays(arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> Trajectory:
    """Undo :func:`to_arrays`; other arrays are passed over."""
    names = {f.name for f in dataclasses.fields(Trajectory)}
    values: dict[str, Any] = {n: jnp.asarray(x) for n, x in arrays.items() if n in names}
    kernel = {n.removeprefix("kernel/"): x for n, x in arrays.items() if n.startswith("kernel/")}
    if kernel:
        values["kernel"] = PairKernel(**{n: jnp.asarray(x) for n, x in kernel.items()})
    return Trajectory(**values, config=header.get("config", {}))
