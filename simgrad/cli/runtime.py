"""JAX settings that a command makes before JAX starts."""

from __future__ import annotations

import logging
import os

__all__ = ["HOST_DEVICES", "prepare"]

HOST_DEVICES = min(os.cpu_count() or 1, 8)
"""Devices to split the CPU in where many small runs are made: XLA uses one core for each of them."""


def prepare(dtype: str = "float32", host_devices: int | None = None) -> None:
    """Persistent compilation cache, 64-bit mode where asked for, quiet libraries.

    ``host_devices`` splits the CPU in that many devices, so that many small runs use all cores.
    """
    if host_devices and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        flag = f"--xla_force_host_platform_device_count={host_devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    import jax

    from simgrad.storage import cache_folder

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    jax.config.update("jax_enable_x64", dtype == "float64")
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
