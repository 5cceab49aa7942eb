"""The ``simgrad`` command. Parses and calls; all work happens below this floor."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs
    from types import TracebackType

__all__ = ["main"]


def main() -> None:
    """Entry point.

    ``simgrad score | report | predict | sweep | world | worlds | objectives | figures | validate |
    bench``.
    """
    sys.unraisablehook, sys.excepthook = _interrupt_again, _note
    try:  # imports take a second: whoever interrupts them is answered too
        from simgrad.cli.commands import parsed

        sys.exit(parsed().run())
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, KeyboardInterrupt) or _noted:
            again = "\nInterrupted. Run the same command again to continue."
            print(again, file=sys.stderr, flush=True)
            if "jax" not in sys.modules:  # libraries that are half imported crash on the way out
                os._exit(130)
            sys.exit(130)
        from simgrad.cli.problems import explained

        sys.exit(explained(error))


_noted: list[BaseException] = []
"""Interrupts that C code has turned into errors of its own."""


def _note(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Keep an interrupt that C code prints; NumPy's import does, and raises an ImportError."""
    if issubclass(kind, KeyboardInterrupt):
        _noted.append(error)
    else:
        sys.__excepthook__(kind, error, trace)


def _interrupt_again(ignored: UnraisableHookArgs) -> None:
    """Deliver Ctrl-C once more when it fell into a callback that Python cannot leave by raising.

    JAX hooks into garbage collection, where a KeyboardInterrupt is printed and dropped: the command
    would run on. A thread sends it again once that callback has returned.
    """
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(ignored)
