"""Many processes that run the same program: what the first decides, and what all must agree on.

They talk through JAX's own runtime (``jax.distributed.initialize``, collectives of
:mod:`jax.experimental.multihost_utils`). With one process every function here is the plain call.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np

from simgrad.errors import InputError
from simgrad.store import RunMismatchError, differences

T = TypeVar("T")


def is_first() -> bool:
    """Whether this process writes files and speaks for all."""
    return jax.process_index() == 0


def gathered(text: bytes) -> list[bytes]:
    """What every process gave, by process, on every process.

    >>> gathered(b"here")
    [b'here']
    """
    if jax.process_count() == 1:
        return [text]
    from jax.experimental.multihost_utils import process_allgather

    lengths = process_allgather(np.int32(len(text)))
    everything = process_allgather(_padded(text, int(lengths.max())))
    return [row[:n].astype(np.uint8).tobytes() for row, n in zip(everything, lengths, strict=True)]


def on_first(make: Callable[[], T]) -> T:
    """``make()`` of the first process, on every process; what it raises there is raised everywhere.

    The value and the exception must pickle.
    """
    if jax.process_count() == 1:
        return make()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    text, problem = b"", None
    if is_first():
        try:
            text = pickle.dumps((make(), None))
        except Exception as error:
            text, problem = pickle.dumps((None, error)), error
    length = int(broadcast_one_to_all(np.int32(len(text))))
    everything = np.asarray(broadcast_one_to_all(_padded(text, length)))
    if problem is not None:
        raise problem
    value, error = pickle.loads(everything[:length].astype(np.uint8).tobytes())
    if error is not None:
        raise error
    return value


def on_all(make: Callable[[], T]) -> T:
    """Call ``make()`` on every process; if it fails on one, all raise instead of waiting.

    Raises:
        InputError: what another process was given cannot be used.
        RuntimeError: it failed on another process otherwise.
    """
    try:
        value, problem = make(), None
    except Exception as error:
        value, problem = None, error
    text = "" if problem is None else f"{type(problem).__name__}: {problem}"
    given = isinstance(problem, InputError | OSError)
    texts = [json.loads(found) for found in gathered(json.dumps([text, given]).encode())]
    if problem is not None:
        raise problem
    for process, (text, given) in enumerate(texts):
        if text:
            kind = InputError if given else RuntimeError
            raise kind(f"process {process} failed: {text}")
    return value  # type: ignore[return-value]


def require_same_everywhere(identity: Mapping[str, str]) -> None:
    """Raise on every process unless all of them were given the same arguments.

    Raises:
        RunMismatchError: names the arguments that differ.
    """
    everywhere = [json.loads(text) for text in gathered(json.dumps(identity).encode())]
    for process, other in enumerate(everywhere):
        where = ("on process 0", f"on process {process}")
        if differ := differences(everywhere[0], other, where):
            raise RunMismatchError(
                f"the processes were started with different arguments ({differ})"
            )


def _padded(text: bytes, length: int) -> np.ndarray:
    """Bytes as an array whose size is a power of two, so that few shapes are compiled."""
    array = np.zeros(1 << max(10, length.bit_length()), np.uint8)
    array[: len(text)] = np.frombuffer(text, np.uint8)
    return array
