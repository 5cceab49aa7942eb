"""``simgrad bench``: speed side by side with what others would run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from simgrad.validation.bench.sweeps import SweepMeasurement


@dataclass
class Bench:
    """Time simgrad against the published PyTorch procedure, as ratios from one random-weight run.

    A line a task and length: seconds a pair, how many times faster, the largest error, the time
    over that of its own bare passes, FLOPs a pair and their share of the best matrix product's
    speed, bytes of parameters that a batch has to move, and temporary memory. Without torch there
    is no comparison. Sweeps of small models run against a plain loop; they split the CPU, so they
    have a run of their own, as have two tables: ways to a kernel (predicted and measured), and
    growth with pairs and tokens.
    """

    out: Path | None = None
    """JSON file to write."""
    # fmt: off
    only: Literal[
        "scoring", "logprobs", "gradients", "tokens", "dataset", "directional", "sweeps", "routes",
        "growth",
    ] | None = None
    # fmt: on
    """Time only this (default: all six tasks; sweeps and tables by name)."""
    repeats: int = 3
    """Timings of each contestant."""
    pairs: int = 4
    """Pairs per length: one batch for simgrad, one by one for the published procedure."""
    lengths: tuple[tuple[int, int], ...] = ((96, 32), (32, 32), (128, 64))
    """Prompt and response tokens; the first entry serves several tasks.

    Kernels of the data set, directional scores and growth use only the first.
    """
    token_lengths: tuple[int, int] = (32, 24)
    """Prompt and response tokens of token kernels."""
    shape: Literal["gpt2", "small", "llama-135m", "llama-360m", "llama-1b"] = "gpt2"
    """Shape of the model; small has 4 layers of width 128 and GPT-2's vocabulary."""
    depth: int | None = None
    """Layers (default: those of the shape)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations."""

    def run(self) -> int:
        """Measure and print a line at a time."""
        from rich.console import Console

        console = Console(highlight=False, markup=False, soft_wrap=True)
        measure = self._sweeps if self.only == "sweeps" else self._tasks
        record = measure(console.print)
        if record["provenance"]["torch"] is None:
            console.print("torch is not installed: no comparison (pip install 'simgrad[parity]')")
        if self.out is not None:
            from simgrad.validation.bench import write

            write(record, self.out)
        return 0

    def _tasks(self, show: Callable[[str], None]) -> dict[str, Any]:
        from simgrad.cli.runtime import prepare

        prepare()
        from simgrad.validation.bench import TASKS, Config, bench

        given = {name: x for name, x in vars(self).items() if name not in ("out", "only")}
        tasks = tuple(TASKS) if self.only is None else (self.only,)
        if set(tasks) & set(TASKS):
            show("".join(f"{title:>{width}}" for title, width in _COLUMNS))
        record = bench(Config(**given), lambda found: show(_line(found)), tasks)
        if measured := record["measurements"]:
            best = max(m["ceiling"] for m in measured) / 1e9
            show(f"ceiling: {best:.0f} GFLOP/s, a large {self.dtype} matrix product")
        return record

    def _sweeps(self, show: Callable[[str], None]) -> dict[str, Any]:
        from simgrad.cli.runtime import HOST_DEVICES, prepare

        prepare(host_devices=HOST_DEVICES)
        from simgrad.validation.bench.sweeps import SweepConfig, bench_sweeps

        return bench_sweeps(SweepConfig(repeats=self.repeats), lambda m: show(_sweep_line(m)))


_COLUMNS = (
    ("", 12), ("tokens", 10), ("s/pair", 8), ("times faster", 24), ("error", 7), ("own passes", 21),
    ("GFLOP", 8), ("ceiling", 8), ("GB moved", 10), ("memory", 9),
)  # fmt: skip


def _line(found: Any) -> str:
    """A task's line of the table, or a line or two on routes or growth."""
    from simgrad.validation.bench import Growth, Route

    if isinstance(found, Growth):
        each = ", ".join(f"{n}: {s:.3g} s" for n, s in zip(found.sizes, found.seconds, strict=True))
        return f"{found.task:<10} by {found.grows:<7} {each}   exponent {found.exponent:.2f}"
    if isinstance(found, Route):
        ways = (f"{n} {p:.2f} ({found.measured[n]:.2f})" for n, p in found.predicted.items())
        picked = f"picks {found.chosen}, fastest {found.fastest}"
        lengths = f"{found.prompt} + {found.response}"
        return f"{lengths}: predicted (measured) {'   '.join(ways)}\n   {picked}"
    faster, error = "no torch", ""
    if found.ratio is not None:
        faster, error = _ranged(found.ratio, found.ratio_range), f"{found.error:.0e}"
    values = (
        f"{found.prompt} + {found.response}",
        f"{found.seconds:.3f}",
        faster,
        error,
        _ranged(found.own_limit, found.own_range),
        f"{found.flops / 1e9:.3g}",
        f"{found.achieved:.0%}",
        f"{found.bytes / 1e9:.2g}",
        f"{found.temporary / 1e6:.0f} MB",
    )
    columns = zip(values, _COLUMNS[1:], strict=True)
    return f"{found.task:<12}" + "".join(f"{value:>{width}}" for value, (_, width) in columns)


def _sweep_line(m: SweepMeasurement) -> str:
    runs = f"{m.task:<20} {m.batch_size:>2} pairs a step  {m.runs:>4} runs"
    parts = [runs, f"{m.seconds:8.4f} s/run"]
    if m.ratio is not None and m.ratio_range is not None:
        low, high = m.ratio_range
        times = f"{m.ratio:6.1f}x a PyTorch loop ({low:.1f} to {high:.1f})"
        parts.append(f"{times}, agrees to {m.error:.0e}")
    return "   ".join([*parts, f"{m.compiling:.1f} s to compile"])


def _ranged(median: float, reach: tuple[float, float]) -> str:
    return f"{median:.2f} ({reach[0]:.2f} to {reach[1]:.2f})"
