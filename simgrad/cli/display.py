"""What commands show on the terminal."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from simgrad.bridge import ScoreTable
    from simgrad.bridge.engine.columns import Column
    from simgrad.experiments.findings import Findings
    from simgrad.experiments.findings import Table as TidyTable
    from simgrad.objectives import Description


@contextmanager
def loading(console: Console, text: str) -> Iterator[None]:
    """A spinner around slow preparations."""
    with console.status(text):
        yield


@contextmanager
def progress_bar(
    console: Console, text: str, unit: str = "pairs"
) -> Iterator[Callable[[int, int], None]]:
    """A bar with units per second and time left; yields a function of (done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console)
    begin: list[tuple[float, int]] = []

    def update(done: int, total: int) -> None:
        if not begin:  # no bar before there is progress: what is refused first stands alone
            begin.append((time.monotonic(), done))
            bar.add_task(text, total=total, rate="compiling")
            bar.start()
        seconds, fresh = time.monotonic() - begin[0][0], done - begin[0][1]
        rate = f"{fresh / seconds:.2f} {unit}/s" if fresh and seconds else "compiling"
        bar.update(bar.task_ids[0], completed=done, total=total, rate=rate)

    try:
        yield update
    finally:
        if begin:
            bar.stop()


def summary(console: Console, table: ScoreTable, out: Path, worst: int) -> None:
    """Counts by regime, the worst pairs and what to try."""
    from simgrad.report.summary import summarise

    s = summarise(table, worst)
    skipped = sum(s.skipped.values())
    console.print(f"\n[bold]{s.scored} pairs scored[/], {skipped} skipped → {out}", highlight=False)
    for reason, count in s.skipped.items():
        console.print(f"  {count:>5} skipped: {reason}", highlight=False)
    if s.truncated:
        console.print(f"  {s.truncated:>5} responses cut at the length limit", highlight=False)
    if s.merged:
        console.print(
            f"  {s.merged:>5} responses tokenised apart (merged with their prompt)", highlight=False
        )
    if s.regimes and s.scored:
        console.print("\n[bold]Regimes[/] (first order, each pair trained alone)")
        texts = {
            "ideal": "chosen rises, rejected falls",
            "both_fall": "chosen falls too",
            "both_rise": "rejected rises too",
            "reversed": "chosen falls, rejected rises",
        }
        for label, count in s.regimes.items():
            console.print(
                f"  {count:>5} {label:<10} {100 * count / s.scored:5.1f} %  {texts[label]}",
                highlight=False,
            )
    if len(s.worst):
        console.print(_rows(table, f"Worst pairs: {s.order}", s.columns, s.worst))
        if s.regimes and table.metadata["run"].get("learning_rate") is None:
            console.print("Δ log π is per unit learning rate (--lr gives nats).", style="dim")
    for line in s.advice:
        console.print(f"• {line}", highlight=False)
    if len(table):
        console.print(
            f"• Tokens, confounds and mitigations on one page: simgrad report {out}",
            highlight=False,
        )


def prediction(console: Console, table: ScoreTable, out: Path, worst: int) -> None:
    """How many responses are predicted to fall over a run, and which fall most."""
    from simgrad.report.summary import summarise_prediction

    s = summarise_prediction(table, worst)
    console.print(
        f"\n[bold]{len(table)} pairs[/], {len(table.skipped)} skipped, {s.steps} steps → {out}",
        highlight=False,
    )
    for line in s.lines:
        console.print(f"  {line}", highlight=False)
    console.print(_rows(table, "Predicted to fall most", s.columns, s.worst))


def _rows(table: ScoreTable, title: str, columns: Sequence[Column], rows: Iterable[int]) -> Table:
    """Some rows of a table, with the headers and formats that its columns declare."""
    view = Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in columns:
        view.add_column(
            column.short or column.label,
            justify="right",
            no_wrap=True,
            min_width=max(map(len, column.labels), default=0),
        )
    for row in rows:
        view.add_row(*(format(table[c.name][row], c.show) for c in columns))
    return view


def objective_table(console: Console, descriptions: Iterable[Description]) -> None:
    """Every objective in a few lines, by family, and the notation."""
    from simgrad.objectives import NOTATION

    for family, members in itertools.groupby(descriptions, lambda d: d.family):
        view = Table.grid(padding=(0, 2), expand=True)
        view.add_column(width=12, no_wrap=True)
        view.add_column(ratio=1)
        view.add_column(width=19)
        for d in members:
            view.add_row(d.name, _facts(d), Text(d.source.split(",")[0], style="dim"))
        console.print(f"\n[bold]{family}[/]", highlight=False)
        console.print(view)
    console.print("\n[bold]Notation[/]")
    notation = Table.grid(padding=(0, 2))
    for symbol, meaning in NOTATION.items():
        notation.add_row(Text(f"  {symbol}"), Text(meaning))
    console.print(notation)
    console.print("\nWhere no line says when d_w < 0, it never is.", highlight=False)
    console.print(
        "Hyperparameters, defaults and full sources: simgrad objectives NAME ...", highlight=False
    )
    console.print(
        "TRL's loss types: trl:sigmoid, trl:ipo, ..., trl:cpo/simpo, trl:kto/kto", highlight=False
    )


def objective_in_full(console: Console, description: Description) -> None:
    """One objective with its hyperparameters."""
    from simgrad.objectives import SYMBOLS

    d = description
    console.print(f"\n[bold]{d.name}[/]  {d.title}", highlight=False)
    view = Table.grid(padding=(0, 2))
    view.add_column(no_wrap=True)
    values = [f"{SYMBOLS.get(k, '')} {k}={v}".strip() for k, v in d.hyperparameters.items()]
    rows = {
        "loss": d.formula,
        "d_w/d_l": d.ratio,
        "d_w < 0": f"where {d.pushes_chosen_down}" if d.pushes_chosen_down else "never",
        "reference": "needed" if d.uses_reference else "not needed",
        "batch": "couples its pairs" if d.batch_coupled else "each pair by itself",
        "defaults": ", ".join(values) or "none",
        "source": d.source,
    }
    for key, value in rows.items():
        view.add_row(Text(f"  {key}"), Text(value))
    console.print(view)


def _facts(d: Description) -> Text:
    text = Text(d.formula)
    if d.ratio != "1":
        text.append(f"\nd_w/d_l = {d.ratio}", style="cyan")
    if d.pushes_chosen_down:
        text.append(f"\nd_w < 0 where {d.pushes_chosen_down}", style="red")
    return text


def findings_tables(console: Console, found: Findings) -> None:
    """Every table of an experiment, one line a setting, then the claims."""
    knobs = ", ".join(f"{k}={v}" for k, v in found.knobs.items())
    seeds = "seed " + " ".join(map(str, found.seeds))
    console.print(
        f"[bold]{found.world}[/] ({seeds}; mean ± half of the 95 % interval)", highlight=False
    )
    console.print(Text(knobs, style="dim"))
    for table in found.tables:
        tidy_table(console, table)
    if found.claims:
        console.print("\n[bold]What these seeds say[/]")
    for claim in found.claims:
        marks = {True: "[green]holds[/]      ", False: "[red]does not[/]   ", None: "not tested "}
        mark = marks[claim.holds]
        console.print(f"  {mark}{claim.text}\n             {claim.numbers}", highlight=False)


def tidy_table(console: Console, table: TidyTable) -> None:
    """One line a setting: means with intervals, then the caption."""
    lines = table.summary()
    view = Table(
        title=f"\n{table.name}",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in lines[0]:
        texts = isinstance(lines[0][name], str)
        view.add_column(name, justify="left" if texts else "right", no_wrap=name in table.by)
    for line in lines:
        view.add_row(*("–" if str(value) == "nan" else str(value) for value in line.values()))
    whole = Measurement.get(console, console.options.update(max_width=1000), view).maximum
    if (
        whole > console.width and not console.is_terminal
    ):  # a log keeps every digit; a terminal wraps headers
        console = Console(file=console.file, width=whole)
    console.print(view)
    console.print(Text(table.caption, style="dim"))


def world_listing(console: Console) -> None:
    """All worlds with their knobs."""
    import dataclasses
    import inspect

    from simgrad import worlds

    for name in worlds.names():
        world = worlds.get(name)
        module = inspect.getmodule(type(world))
        title = (inspect.getdoc(module) or "").split("\n")[0].split(": ", 1)[-1]
        console.print(f"\n[bold]{name}[/]  {title}", highlight=False)
        for paragraph in (
            (inspect.getdoc(type(world)) or "").split("Attributes:")[0].strip().split("\n\n")
        ):
            console.print(
                Padding(Text(" ".join(paragraph.replace("``", "").split())), (0, 0, 0, 2))
            )
        meanings = _meanings(inspect.getdoc(type(world)) or "")
        view = Table.grid(padding=(0, 2))
        for field in dataclasses.fields(world):
            knob = f"{field.name}={getattr(world, field.name)}"
            view.add_row("  ", Text(knob, style="cyan"), Text(meanings.get(field.name, "")))
        console.print(view)
    console.print("\nRun one: simgrad world NAME --seeds 5 --set KNOB=VALUE", highlight=False)


def _meanings(docstring: str) -> dict[str, str]:
    """Attribute to its description in a Google-style docstring."""
    meanings: dict[str, str] = {}
    name = ""
    for line in docstring.partition("Attributes:")[2].splitlines():
        head, colon, rest = line.strip().partition(":")
        if (
            line.startswith("    ")
            and not line.startswith("     ")
            and colon
            and head.isidentifier()
        ):
            name = head
            meanings[name] = rest.strip()
        elif name and line.strip():
            meanings[name] += " " + line.strip()
    return meanings
