"""JAX settings that a command makes before JAX starts."""

from __future__ import annotations

import logging
import os
from pathlib import Path

__all__ = ["cache_folder", "prepare"]


def cache_folder() -> Path:
    """Where compiled programs are kept: $SIMGRAD_CACHE, or ~/.cache/simgrad."""
    return Path(os.environ.get("SIMGRAD_CACHE", Path.home() / ".cache" / "simgrad"))


def prepare(dtype: str = "float32") -> None:
    """Persistent compilation cache, 64-bit mode where asked for, quiet libraries."""
    import jax

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    jax.config.update("jax_enable_x64", dtype == "float64")
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
