"""The ``simgrad`` command. Parses and calls; all work happens below this floor."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Entry point.

    ``simgrad score | report | predict | sweep | world | worlds | objectives | figures | validate |
    bench``.
    """
    try:  # imports take a second: whoever interrupts them is answered too
        from simgrad.cli.commands import parsed

        sys.exit(parsed().run())
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again to continue.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        from simgrad.cli.problems import explained

        sys.exit(explained(error))
