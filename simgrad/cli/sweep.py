"""``simgrad sweep``: a grid of training recipes on a world's preference pairs, over seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from simgrad.errors import InputError

if TYPE_CHECKING:
    from simgrad.dynamics import RunConfig, SweepTable
    from simgrad.experiments.findings import Interval
    from simgrad.worlds import World


@dataclass
class Sweep:
    """Train a world's policies on its pairs for each combination of a grid, and tabulate results.

    One row a combination and seed, over all local devices. Interrupted or killed, the same command
    continues. What the grid leaves out is the world's own: DPO with its beta, Adam, its learning
    rate, steps, batch size.
    """

    world: tyro.conf.Positional[str]
    """Which world: see `simgrad worlds`."""
    out: Path
    """Parquet file to write, with an .npz file beside it.

    The .npz file holds every pair's change and what is needed to continue.
    """
    grid: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE,... ...")] = ()
    """Settings to combine, as names with one or more values each.

    The names are objective, optimizer (sgd, momentum, rmsprop, adam, adamw), learning_rate,
    momentum, weight_decay, clip, steps, batch_size, accumulate, include (patterns joined by +),
    mitigation (pairwise-normalised, calibrated, running, projected, mask) and hyperparameters of
    the objective, as in --grid objective=dpo,ipo beta=0.05,0.1."""
    seeds: int = 5
    """Number of seeds, each with its own policy, pairs and order; 95 % intervals are over seeds."""
    first_seed: int = 0
    """The first of them."""
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KNOB=VALUE ...")] = ()
    """Other values of the world's knobs, as in --set n_pairs=64."""

    def run(self) -> int:
        """Train, save, tabulate."""
        from rich.console import Console
        from rich.progress import Progress

        from simgrad.cli.display import loading
        from simgrad.cli.parsing import assignments
        from simgrad.cli.runtime import HOST_DEVICES, prepare

        if self.seeds < 1 or self.first_seed < 0:
            raise InputError(
                f"--seeds {self.seeds} --first-seed {self.first_seed}: at least one, counted from 0"
            )
        if self.out.suffix != ".parquet":
            raise InputError(f"--out {self.out}: tables are written as .parquet")
        prepare(host_devices=HOST_DEVICES)
        import dataclasses

        from simgrad import worlds
        from simgrad.dynamics import sweep
        from simgrad.store import write_parquet

        world = worlds.get(self.world, **assignments(self.settings, "--set"))
        kept = self.out.with_suffix(".npz")
        if self.out.exists() and not kept.exists():
            raise InputError(
                f"{self.out} is there, but not its {kept.name}: choose another --out or delete it"
            )
        configs, seeds = (
            _configs(world, self.grid),
            range(self.first_seed, self.first_seed + self.seeds),
        )
        console = Console(stderr=True)
        with loading(console, f"Pretraining {self.world} over {self.seeds} seeds"):
            apply, thetas = world.policies(seeds)
            batches = _batches(world, seeds)
        with Progress(console=console) as bar:
            task = bar.add_task("Training", total=len(configs) * len(seeds))
            table = sweep(
                apply,
                thetas,
                batches,
                configs,
                seeds=seeds,
                out=kept,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        metadata = {"world": self.world, "knobs": dataclasses.asdict(world), **table.config}
        write_parquet(self.out, table.columns, metadata)
        _show(self.world, table, self.seeds)
        print(self.out)
        return 0


def _configs(world: World, texts: tuple[str, ...]) -> list[RunConfig]:
    """The grid, completed with what is usual in the world."""
    from simgrad.cli.parsing import assignments, value_of
    from simgrad.dynamics import grid

    if not world.has_transformer:
        raise InputError(
            f"{world.name} has no pretrained policies to sweep over: choose another world"
        )
    values: dict[str, Any] = {}
    for name, value in assignments(texts, "--grid").items():
        parts = [value_of(part) for part in value.split(",")] if isinstance(value, str) else value
        values[name] = list(parts) if isinstance(parts, list | tuple) else [parts]
    if "include" in values:
        values["include"] = [
            x if x is None else tuple(str(x).split("+")) for x in values["include"]
        ]
    recipe = getattr(world, "recipe", None)
    usual = {
        name: getattr(recipe() if recipe else world, name, None) for name in ("steps", "batch_size")
    }
    usual["learning_rate"] = getattr(world, "learning_rate", None)
    if not {"objective", "beta"} & set(values):
        usual["beta"] = getattr(world, "beta", None)
    return grid(
        **{
            name: value for name, value in usual.items() if value is not None and name not in values
        },
        **values,
    )


def _batches(world: World, seeds: range) -> Any:
    """Each seed's pairs in one common shape, packed so that prompts are computed once."""
    import jax
    import numpy as np

    from simgrad.pairs import packed

    pairs = [world.pairs(seed) for seed in seeds]
    if len({len(some) for some in pairs}) > 1:
        raise InputError(
            f"{world.name} has another number of pairs with every seed: sweep with --seeds 1"
        )
    length = max(len(p.prompt) + len(p.chosen) + len(p.rejected) for some in pairs for p in some)
    rows = max(len(y) for some in pairs for p in some for y in (p.chosen, p.rejected))
    return jax.tree.map(lambda *xs: np.stack(xs), *(packed(some, length, rows) for some in pairs))


MEASURED = {
    "dlogp_chosen": "Δ log π\nchosen",
    "dlogp_rejected": "Δ log π\nrejected",
    "chosen_falls": "chosen\nfalls",
    "both_fall": "both\nfall",
}


def _show(world: str, table: SweepTable, seeds: int) -> None:
    """One line a configuration; what all have in common goes above."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from simgrad.experiments.findings import interval

    names = list(table.columns)[: list(table.columns).index("seed")]
    rows = range(0, len(table), seeds)
    varied = [name for name in names if len({str(table[name][i]) for i in rows}) > 1]
    fixed = {name: table[name][0] for name in names if name not in varied}
    common = ", ".join(
        f"{name}={value}" for name, value in fixed.items() if str(value) not in ("", "nan")
    )
    over = f"{seeds} seeds; mean ± half of the 95 % interval" if seeds > 1 else "one seed"
    console = Console()
    console.print(f"[bold]{world}[/] ({over})", highlight=False)
    console.print(Text(common, style="dim"))
    view = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in varied:
        view.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    for title in MEASURED.values():
        view.add_column(title, justify="right", no_wrap=True)
    diverged = table["diverged"] >= 0
    if diverged.any():
        view.add_column("diverged", justify="right", no_wrap=True)
    for i in rows:
        some = slice(i, i + seeds)
        line = [_plain(table[name][i]) for name in varied]
        line += [_text(interval(table[name][some]), "fall" in name) for name in MEASURED]
        view.add_row(*line, *([f"{diverged[some].sum()}/{seeds}"] if diverged.any() else []))
    # a narrow terminal wraps lines, but hides no digits
    Console(width=max(console.width, Console(width=1000).measure(view).maximum)).print(view)


def _plain(value: Any) -> str:
    return (
        "–"
        if str(value) in ("", "nan")
        else f"{value:g}"
        if not isinstance(value, str)
        else str(value)
    )


def _text(found: Interval, share: bool) -> str:
    half = (found.high - found.low) / 2
    mean, half = (f"{x:.2f}" if share else f"{x:.3g}" for x in (found.mean, half))
    return "–" if mean == "nan" else mean if half == "nan" else f"{mean} ±{half}"
