"""JAX settings that a command makes before JAX starts."""

from __future__ import annotations

import logging
import math
import os
from typing import TYPE_CHECKING

from simgrad.errors import InputError

if TYPE_CHECKING:
    from jax.sharding import Mesh

HOST_DEVICES = min(os.cpu_count() or 1, 8)
"""CPU devices for tasks with many small runs, since XLA uses one core for each run."""


def prepare(dtype: str = "float32", host_devices: int | None = None) -> None:
    """Persistent compilation cache, 64-bit mode where asked for, quiet libraries.

    ``host_devices`` splits the CPU in that many devices, so that many small runs use all cores.
    """
    if host_devices and "xla_force_host_platform_device_count" not in os.environ.get(
        "XLA_FLAGS", ""
    ):
        flag = f"--xla_force_host_platform_device_count={host_devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    import jax

    from simgrad.store import cache_folder

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    jax.config.update("jax_enable_x64", dtype == "float64")
    # where an error was raised says whose it is, see simgrad.cli.problems
    jax.config.update("jax_traceback_filtering", "off")
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def connect(
    dtype: str,
    axes: dict[str, int] | None,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Mesh | None:
    """:func:`prepare` for a command that runs on many devices or in many processes, and their mesh.

    Without ``axes``, one process takes one device (no mesh), and many take all of theirs for the
    data axis. ``coordinator`` is the address of the first process, or ``auto`` where a cluster says
    it.

    Raises:
        InputError: arguments that do not go together; a mesh of another size than the devices.
    """
    numbers = (processes, process)
    if coordinator in (None, "auto") and numbers != (None, None):
        raise InputError(
            "--processes and --process go with --coordinator HOST:PORT, the address of process 0"
        )
    if coordinator not in (None, "auto") and (
        processes is None or process is None or not 0 <= process < processes
    ):
        raise InputError(
            "--coordinator HOST:PORT needs --processes N, and --process I from 0 to N - 1"
        )
    devices = math.prod(axes.values()) if axes else 1
    if devices % (processes or 1) and axes:
        raise InputError(
            f"--mesh takes {devices} devices, which {processes} processes cannot share equally"
        )
    prepare(dtype, devices // (processes or 1) if axes and coordinator != "auto" else None)
    import jax

    if coordinator is not None:
        address = None if coordinator == "auto" else coordinator
        try:  # where one process fails, the others wait for it no longer than a minute
            jax.distributed.initialize(address, processes, process, shutdown_timeout_seconds=60)
        except ValueError as error:
            remedy = "give --coordinator HOST:PORT --processes N --process I"
            raise InputError(
                f"--coordinator {coordinator}: JAX finds no processes ({error}): {remedy}"
            ) from error
        axes = axes or {"data": jax.device_count()}
    if axes is None:
        return None
    from simgrad.bridge import device_mesh

    return device_mesh(**axes)
