"""What commands show on the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from simgrad.bridge import ScoreTable

__all__ = ["loading", "progress_bar", "summary"]


@contextmanager
def loading(console: Console, text: str) -> Iterator[None]:
    """A spinner around slow preparations."""
    with console.status(text):
        yield


@contextmanager
def progress_bar(console: Console, text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with pairs per second and time left; yields a function of (done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(text, total=None, rate="compiling")
        begin: list[tuple[float, int]] = []

        def update(done: int, total: int) -> None:
            begin.append((time.monotonic(), done)) if not begin else None
            seconds, fresh = time.monotonic() - begin[0][0], done - begin[0][1]
            rate = f"{fresh / seconds:.2f} pairs/s" if fresh and seconds else "compiling"
            bar.update(task, completed=done, total=total, rate=rate)

        yield update


def summary(console: Console, table: ScoreTable, out: Path, worst: int) -> None:
    """Counts by regime, the worst pairs and what to try."""
    from simgrad.bridge.summary import summarise

    s = summarise(table, worst)
    skipped = sum(s.skipped.values())
    console.print(f"\n[bold]{s.scored} pairs scored[/], {skipped} skipped → {out}", highlight=False)
    for reason, count in s.skipped.items():
        console.print(f"  {count:>5} skipped: {reason}", highlight=False)
    if s.truncated:
        console.print(f"  {s.truncated:>5} responses cut at the length limit", highlight=False)
    if s.merged:
        console.print(f"  {s.merged:>5} responses tokenised apart (merged with their prompt)", highlight=False)
    if s.regimes and s.scored:
        console.print("\n[bold]Regimes[/] (first order, each pair trained alone)")
        texts = {
            "ideal": "chosen rises, rejected falls",
            "both_fall": "chosen falls too",
            "both_rise": "rejected rises too",
            "reversed": "chosen falls, rejected rises",
        }
        for label, count in s.regimes.items():
            console.print(f"  {count:>5} {label:<10} {100 * count / s.scored:5.1f} %  {texts[label]}", highlight=False)
    if len(s.worst):
        console.print(_worst(table, s.order, s.worst))
    for line in s.advice:
        console.print(f"• {line}", highlight=False)


def _worst(table: ScoreTable, order: str, rows: Iterable[int]) -> Table:
    columns = {
        "row": "{index}",
        "tokens: prompt +\nchosen / rejected": "{n_prompt} + {n_chosen} / {n_rejected}",
        "log π\nchosen": "{logp_chosen:.4g}",
        "ln-CHES": "{ln_ches:.3g}",
    }
    if "regime" in table:
        columns |= {
            "cosine of\ngradients": "{grad_cosine:.3f}",
            "Δ log π\nchosen": "{predicted_dlogp_chosen:.4g}",
            "regime": "{regime}",
        }
    else:
        columns |= {"CHES": "{ches:.4g}", "head gap": "{head_gap:.4g}"}
    view = Table(
        title=f"\nWorst pairs: {order}", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    for name in columns:
        view.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        values = {name: table[name][row] for name in table}
        view.add_row(*(template.format(**values) for template in columns.values()))
    return view
