"""What a command says when it fails: one line about what was given, or a traceback to report."""

from __future__ import annotations

import dis
import sys
import traceback

from simgrad.errors import InputError


def explained(error: Exception) -> int:
    """Print what went wrong; the exit status: 2 what was given, 3 memory, 70 simgrad itself."""
    if isinstance(error, InputError | OSError | FloatingPointError) or is_refusal(error):
        print(f"simgrad: {error}", file=sys.stderr)
        return 2
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        print(
            "simgrad: out of memory. Lower --batch-tokens or --max-length; finished pairs are kept",
            file=sys.stderr,
        )
        return 3
    traceback.print_exception(error)
    print(
        "simgrad: this is an error in simgrad, not in what you gave it. Please report it with the "
        "lines above.",
        file=sys.stderr,
    )
    return 70


def is_refusal(error: Exception) -> bool:
    """Whether simgrad refuses an argument: it raised the ValueError itself, outside of any trace.

    What NumPy or JAX raise, and what is raised while JAX traces a computation, comes from simgrad's
    own mistakes. (:func:`simgrad.cli.runtime.prepare` makes JAX keep its frames.)
    """
    entries = list(traceback.walk_tb(error.__traceback__))
    if not isinstance(error, ValueError) or not entries or error.__traceback__ is None:
        return False
    owners = [frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in entries]
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    instruction = dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]]
    return owners[-1] == "simgrad" and "jax" not in owners and instruction == "RAISE_VARARGS"
