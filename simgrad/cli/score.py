"""``simgrad score``: which preference pairs will displace their chosen response."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from simgrad.cli.parsing import assignments
from simgrad.errors import InputError


@dataclass
class Score:
    """Score every pair of a preference data set under a checkpoint; one row a pair, in input order.

    Interrupted or killed, the same command continues where it stopped.
    """

    model: str
    """Folder or Hub id of a gpt2, llama, mistral or qwen2 safetensors checkpoint, or world:NAME."""
    data: str
    """A .jsonl, .json, .csv or .parquet file, a Hub data set, or world:NAME.

    A Hub data set is named "org/name" or "org/name:config".
    """
    out: Path
    """Parquet file to write; rows that cannot be scored go to a .skipped.jsonl beside it."""
    limit: int | None = None
    """Read only the first rows."""
    split: str = "train"
    """Split of a Hub data set."""
    max_length: int | None = None
    """Longest prompt + response in tokens; response ends are cut (default: the model's limit)."""
    objective: str = "dpo"
    """Preference objective at the start of training; see `simgrad objectives`.

    The policy is its own reference.
    """
    beta: float | None = None
    """The objective's β (default: its own)."""
    gamma: float | None = None
    """The objective's γ, where it has one."""
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="NAME=VALUE ...")] = ()
    """Its other hyperparameters, as in --set alpha=0.25; `simgrad objectives NAME` lists them."""
    learning_rate: Annotated[float | None, tyro.conf.arg(name="lr")] = None
    """Learning rate η of the predicted SGD step (default: predict per unit learning rate)."""
    gradients: bool = True
    """Exact gradient inner products, predictions and regimes; without them about 5 times faster."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Of parameters and activations; sums accumulate in float32 or better."""
    revision: str | None = None
    """Hub revision of the checkpoint."""
    batch_tokens: int | None = None
    """Token positions each data-axis device evaluates at once (default: CPU 1024, else 16384)."""
    mesh: Annotated[str | None, tyro.conf.arg(metavar="data=D,model=M")] = None
    """Split the parameters over M devices and the pairs over D groups of M devices.

    CPUs are split into D x M devices.
    """
    coordinator: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    """Address of the first of many processes; auto asks the cluster (SLURM ...).

    Each process is started with this same command.
    """
    processes: int | None = None
    """How many they are."""
    process: int | None = None
    """Which of them this one is, from 0; the first writes --out."""
    worst: int = 5
    """How many of the worst pairs the summary shows."""

    def run(self) -> int:
        """Score, save, summarise."""
        from rich.console import Console

        from simgrad.cli.display import loading, progress_bar, summary
        from simgrad.cli.parsing import mesh_axes
        from simgrad.cli.runtime import connect

        axes = None if self.mesh is None else mesh_axes(self.mesh)
        mesh = connect(self.dtype, axes, self.coordinator, self.processes, self.process)
        from simgrad.bridge.engine.processes import is_first, on_all

        console = Console(stderr=True, quiet=not is_first())
        with loading(console, f"Loading {self.model}"):
            from simgrad import objectives
            from simgrad.bridge import load, read_rows, score

            objective = objectives.get(self.objective, **self._hyperparameters())
            rows = on_all(lambda: read_rows(self.data, self.limit, self.split))
            policy = on_all(lambda: load(self.model, self.dtype, self.revision, mesh))
        with progress_bar(console, "Scoring") as progress:
            table = score(
                policy,
                rows,
                objective=objective,
                learning_rate=self.learning_rate,
                gradients=self.gradients,
                max_length=self.max_length,
                out=self.out,
                batch_tokens=self.batch_tokens,
                progress=progress,
            )
        summary(Console(quiet=not is_first()), table, self.out, self.worst)
        return 0 if len(table) else 1

    def _hyperparameters(self) -> dict[str, Any]:
        given = {
            name: value
            for name, value in (("beta", self.beta), ("gamma", self.gamma))
            if value is not None
        }
        more = assignments(self.settings, "--set")
        if twice := sorted(set(given) & set(more)):
            raise InputError(f"{twice[0]} is given twice")
        return given | more
