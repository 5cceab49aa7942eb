"""``simgrad objectives``: what each preference objective does to chosen and rejected responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass
class Objectives:
    """List the preference objectives: loss, d_w/d_l, when d_w < 0, source.

    d_w pulls the log-prob of the chosen response up, d_l pushes the rejected down.

    Where d_w < 0 the loss itself pushes the chosen down, before any entanglement.

    Use the names in `simgrad score --objective`; TRL's go as trl:ipo, trl:cpo/simpo.
    """

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Show these in full, with hyperparameters (default: all, in short)."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print everything as JSON, for programs."""

    def run(self) -> int:
        """Print the table, some objectives in full, or JSON."""
        import dataclasses
        import json

        from rich.console import Console

        from simgrad.cli.display import objective_in_full, objective_table
        from simgrad.objectives import catalog, describe, get

        console = Console()
        for name in self.names:
            if name.startswith("trl:"):
                console.print(f"{name}  {get(name)!r}", highlight=False)
        named = [name for name in self.names if not name.startswith("trl:")]
        if self.names and not named:
            return 0
        shown = [describe(name) for name in named] or catalog()
        if self.json:
            print(json.dumps([dataclasses.asdict(d) for d in shown], ensure_ascii=False, indent=2))
        elif self.names:
            for description in shown:
                objective_in_full(console, description)
        else:
            objective_table(console, shown)
        return 0
