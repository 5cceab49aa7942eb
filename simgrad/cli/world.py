"""``simgrad world`` and ``simgrad worlds``: the small settings, measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from simgrad.errors import InputError


@dataclass
class World:
    """Run a world's experiment: tables with intervals over seeds, and which paper claims hold.

    Policies are pretrained on the spot (seconds) and kept in the cache folder.
    """

    name: tyro.conf.Positional[str]
    """Which world: see `simgrad worlds`."""
    seeds: int = 5
    """How many seeds; intervals are 95 % intervals over them."""
    first_seed: int = 0
    """The first of them."""
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KNOB=VALUE ...")] = ()
    """Other values of the world's knobs, as in --set overlap=0.5 steps=200."""
    out: Path | None = None
    """Folder for one parquet file a table, every seed's row with its knobs and versions."""

    def run(self) -> int:
        """Measure, print, save."""
        import time

        from rich.console import Console

        from simgrad.cli.display import loading
        from simgrad.cli.parsing import assignments
        from simgrad.cli.runtime import HOST_DEVICES, prepare

        if self.seeds < 1 or self.first_seed < 0:
            raise InputError(
                f"--seeds {self.seeds} --first-seed {self.first_seed}: at least one, counted from 0"
            )
        prepare(host_devices=HOST_DEVICES)
        from simgrad import experiments, worlds
        from simgrad.cli.display import findings_tables
        from simgrad.experiments.findings import save_findings

        world = worlds.get(self.name, **assignments(self.settings, "--set"))
        begin = time.monotonic()
        with loading(Console(stderr=True), f"Running {self.name} over {self.seeds} seeds"):
            found = experiments.run(world, range(self.first_seed, self.first_seed + self.seeds))
        console = Console()
        findings_tables(console, found)
        console.print(f"\n{time.monotonic() - begin:.0f} s", highlight=False)
        if self.out is not None:
            for path in save_findings(found, self.out):
                print(path)
        return 0


@dataclass
class Worlds:
    """List the worlds with their knobs and defaults."""

    def run(self) -> int:
        """Print what each world is and can be set to."""
        from rich.console import Console

        from simgrad.cli.display import world_listing

        world_listing(Console())
        return 0
