"""``simgrad bench``: speed side by side with what others would run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Bench"]


@dataclass
class Bench:
    """Time simgrad against PyTorch, as ratios from one run, in float32 with random weights.

    Scoring and gradient scalars run against the published procedure in GPT-2-small's shape; sweeps of small
    models against a plain loop for every run. Without torch only simgrad's own times are shown.
    """

    out: Path | None = None
    """JSON file to write."""
    only: Literal["scoring", "gradients", "sweeps"] | None = None
    """Time only this (default: scoring and gradients; sweeps split the CPU, so they have a run of their own)."""
    repeats: int = 3
    """Timings of each contestant."""
    pairs: int = 4
    """Pairs per shape: one batch for simgrad, one by one for the published procedure."""
    shapes: tuple[tuple[int, int], ...] = ((32, 32), (96, 32), (128, 64))
    """Prompt and response tokens of each shape."""
    depth: int = 12
    """Layers (12 is GPT-2-small)."""

    def run(self) -> int:
        """Measure and print a line at a time."""
        from rich.console import Console

        console = Console()
        record = self._sweeps(console) if self.only == "sweeps" else self._scoring(console)
        if record["provenance"]["torch"] is None:
            console.print("torch is not installed: no comparison (pip install 'simgrad[parity]')")
        if self.out is not None:
            from simgrad.validation.bench import write

            write(record, self.out)
        return 0

    def _scoring(self, console: Console) -> dict[str, Any]:
        from simgrad.cli.runtime import prepare

        prepare()
        from simgrad.validation.bench import Config, Measurement, bench

        def show(m: Measurement) -> None:
            line = f"{m.task:<10} prompt {m.prompt:>4}  response {m.response:>4}   {m.seconds:7.3f} s/pair"
            if m.ratio is not None and m.ratio_range is not None:
                low, high = m.ratio_range
                line += f"   {m.ratio:5.2f}x the published procedure ({low:.2f} to {high:.2f}), agrees to {m.error:.0e}"
            bare = "forward" if m.task == "scoring" else "forward + backward"
            console.print(f"{line}   {m.own_limit:.2f}x its own bare {bare}", highlight=False, soft_wrap=True)

        config = Config(shapes=self.shapes, pairs=self.pairs, repeats=self.repeats, depth=self.depth)
        return bench(config, show, ("scoring", "gradients") if self.only is None else (self.only,))

    def _sweeps(self, console: Console) -> dict[str, Any]:
        from simgrad.cli.runtime import HOST_DEVICES, prepare

        prepare(host_devices=HOST_DEVICES)
        from simgrad.validation.bench_sweep import SweepConfig, SweepMeasurement, bench_sweeps

        def show(m: SweepMeasurement) -> None:
            line = f"{m.task:<20} {m.batch_size:>2} pairs a step  {m.runs:>4} runs   {m.seconds:8.4f} s/run"
            if m.ratio is not None and m.ratio_range is not None:
                low, high = m.ratio_range
                line += f"   {m.ratio:6.1f}x a PyTorch loop ({low:.1f} to {high:.1f}), agrees to {m.error:.0e}"
            console.print(f"{line}   {m.compiling:.1f} s to compile", highlight=False, soft_wrap=True)

        return bench_sweeps(SweepConfig(repeats=self.repeats), show)
