"""Where a number came from: versions, device, git revision. Nothing that changes from run to run."""

from __future__ import annotations

import functools
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

__all__ = ["provenance"]


@functools.cache
def _git_revision() -> str | None:
    """Revision that last changed the package in its checkout, with a plus sign if it has local changes."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        tracked = subprocess.run(
            [*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=False
        )
        if tracked.returncode:
            return None
        revision = subprocess.check_output(
            [*git, "log", "-1", "--format=%H", "--", str(folder)], text=True
        ).strip()
        changes = subprocess.check_output(
            [*git, "status", "--porcelain", "--", str(folder)], text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+" if changes.strip() else "")


def provenance() -> dict[str, Any]:
    """Versions of simgrad and of what its numbers depend on, device kind and git revision."""
    return {
        "simgrad": metadata.version("simgrad"),
        "git_revision": _git_revision(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "x64": bool(jax.config.read("jax_enable_x64")),
    }
