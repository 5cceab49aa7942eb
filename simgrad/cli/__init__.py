"""The ``simgrad`` command. Parses and calls; all work happens below this floor."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

__all__ = ["main"]


def main() -> None:
    """Entry point.

    ``simgrad score | report | predict | sweep | world | worlds | objectives | figures | validate |
    bench``.
    """
    sys.unraisablehook = _interrupt_again
    try:  # imports take a second: whoever interrupts them is answered too
        from simgrad.cli.commands import parsed

        sys.exit(parsed().run())
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again to continue.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        from simgrad.cli.problems import explained

        sys.exit(explained(error))


def _interrupt_again(ignored: UnraisableHookArgs) -> None:
    """Deliver Ctrl-C once more when it fell into a callback that Python cannot leave by raising.

    JAX hooks into garbage collection, where a KeyboardInterrupt is printed and dropped: the command
    would run on. A thread sends it again once that callback has returned.
    """
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(ignored)
