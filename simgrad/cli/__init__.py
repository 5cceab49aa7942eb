"""The ``simgrad`` command. Parses and calls; all work happens below this floor."""

from __future__ import annotations

import sys
from typing import Annotated

__all__ = ["main"]


def main() -> None:
    """Entry point.

    ``simgrad score | report | predict | sweep | world | worlds | objectives | figures | validate |
    bench``.
    """
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

    commands = (
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
    command = tyro.cli(
        commands,  # type: ignore[arg-type]
        prog="simgrad",
        description="What preference optimisation does to the probability of each response, before training.",
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    try:
        sys.exit(command.run())
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again to continue.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"simgrad: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            "simgrad: out of memory. Lower --batch-tokens or --max-length; finished pairs are kept",
            file=sys.stderr,
        )
        sys.exit(3)
