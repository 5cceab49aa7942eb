"""``simgrad bench``: speed side by side with the published procedure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Bench"]


@dataclass
class Bench:
    """Time scoring and gradient scalars against the published PyTorch procedure, as ratios from one run.

    GPT-2-small shape, float32, random weights. Without torch only simgrad's own times are shown.
    """

    out: Path | None = None
    """JSON file to write."""
    pairs: int = 4
    """Pairs per shape: one batch for simgrad, one by one for the published procedure."""
    repeats: int = 3
    """Timings of each contestant."""
    shapes: tuple[tuple[int, int], ...] = ((32, 32), (96, 32), (128, 64))
    """Prompt and response tokens of each shape."""
    depth: int = 12
    """Layers (12 is GPT-2-small)."""

    def run(self) -> int:
        """Measure and print a line at a time."""
        from rich.console import Console

        from simgrad.cli.runtime import prepare

        console = Console()
        prepare()
        from simgrad.validation.bench import Config, Measurement, bench, write

        def show(m: Measurement) -> None:
            line = f"{m.task:<10} prompt {m.prompt:>4}  response {m.response:>4}   {m.seconds:7.3f} s/pair"
            if m.ratio is not None and m.ratio_range is not None:
                low, high = m.ratio_range
                line += f"   {m.ratio:5.2f}x the published procedure ({low:.2f} to {high:.2f}), agrees to {m.error:.0e}"
            bare = "forward" if m.task == "scoring" else "forward + backward"
            console.print(f"{line}   {m.own_limit:.2f}x its own bare {bare}", highlight=False, soft_wrap=True)

        record = bench(Config(shapes=self.shapes, pairs=self.pairs, repeats=self.repeats, depth=self.depth), show)
        if record["provenance"]["torch"] is None:
            console.print("torch is not installed: no comparison (pip install 'simgrad[parity]')")
        if self.out is not None:
            write(record, self.out)
        return 0
