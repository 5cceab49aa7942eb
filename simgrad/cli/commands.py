"""All commands, and what was typed as one of them."""

from __future__ import annotations

from typing import Annotated, Protocol, cast, runtime_checkable

import tyro

from simgrad.cli.bench import Bench
from simgrad.cli.figures import Figures
from simgrad.cli.objectives import Objectives
from simgrad.cli.predict import Predict
from simgrad.cli.report import Report
from simgrad.cli.score import Score
from simgrad.cli.sweep import Sweep
from simgrad.cli.validate import Validate
from simgrad.cli.world import World, Worlds


@runtime_checkable
class Command(Protocol):
    """Arguments, and what is done with them."""

    def run(self) -> int:
        """Do it; the exit status."""
        ...


_COMMANDS = (
    Annotated[Score, tyro.conf.subcommand(name="score")]
    | Annotated[Report, tyro.conf.subcommand(name="report")]
    | Annotated[Predict, tyro.conf.subcommand(name="predict")]
    | Annotated[Sweep, tyro.conf.subcommand(name="sweep")]
    | Annotated[World, tyro.conf.subcommand(name="world")]
    | Annotated[Worlds, tyro.conf.subcommand(name="worlds")]
    | Annotated[Objectives, tyro.conf.subcommand(name="objectives")]
    | Annotated[Figures, tyro.conf.subcommand(name="figures")]
    | Annotated[Validate, tyro.conf.subcommand(name="validate")]
    | Annotated[Bench, tyro.conf.subcommand(name="bench")]
)


def parsed() -> Command:
    """The command line as a command."""
    found = tyro.cli(
        _COMMANDS,  # type: ignore[arg-type]
        prog="simgrad",
        description="What preference optimisation does to the probability of each response, "
        "before training.",
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    return cast(Command, found)
