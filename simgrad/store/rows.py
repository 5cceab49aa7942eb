"""Runs that are finished row by row, and continue where they stopped: ``RowStore``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from simgrad.store.files import load_arrays, save_arrays
from simgrad.store.naming import RunMismatchError, require_same


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Keep a file, whose folder is made if need be, to this process.

    Raises:
        RunMismatchError: another process is writing it.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunMismatchError(f"{path} is in use by another process") from error
    try:
        yield
    finally:
        # while the lock is still held, so that nobody locks a file that is about to go
        if os.name == "posix":
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


class RowStore:
    """Results that are finished row by row, in memory and in a file that is always whole.

    A context manager. Inside it the file is locked against a second writer, and what an earlier run
    of the same identity left is there. Writing takes at most a tenth of the time; the last rows are
    written on the way out, whatever ends the run, so that only SIGKILL loses the seconds since the
    last write. Numbers are kept bit by bit: a continued run gives the table of one that was never
    interrupted.

    Attributes:
        columns: by name an array whose leading axis is the row; rows that are not done hold zeros.
        done: which rows are finished.
    """

    def __init__(self, path: str | Path | None, identity: Mapping[str, str], rows: int) -> None:
        """``path``: an .npz file (None: memory only); ``identity``: see :func:`identity`."""
        self.path = None if path is None else Path(path)
        self.identity, self.rows = dict(identity), rows
        self.columns: dict[str, np.ndarray] = {}
        self.done = np.zeros(rows, bool)
        self._kept, self._cost, self._waiting = 0.0, 0.0, False
        self._held = ExitStack()

    def __enter__(self) -> RowStore:
        """Lock the file and read it.

        Raises:
            RunMismatchError: the file holds another run or no rows at all, or another process is
                writing it.
            InputError: the file is damaged.
        """
        if self.path is None:
            return self
        with ExitStack() as held:
            held.enter_context(locked(self.path))
            if self.path.exists():
                arrays, header = load_arrays(self.path)
                if "__done__" not in arrays:
                    raise RunMismatchError(f"{self.path} holds no rows: choose another file")
                require_same(self.path, header.get("identity", {}), self.identity)
                self.done = arrays.pop("__done__")
                self.columns = arrays
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is not yet written, and unlock the file; it stays until :meth:`remove`."""
        with self._held:
            if self.path is not None and self._waiting:
                self.keep()

    def add(self, rows: Sequence[int] | np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        """Take finished rows: ``columns[name][k]`` belongs to row ``rows[k]``."""
        index = np.asarray(rows, int)
        for name, values in columns.items():
            values = np.asarray(values)
            if name not in self.columns:
                self.columns[name] = np.zeros((self.rows, *values.shape[1:]), values.dtype)
            self.columns[name][index] = values
        self.done[index] = True
        self._waiting = True
        if time.monotonic() - self._kept > 10 * self._cost:
            self.keep()

    def keep(self) -> None:
        """Write all that there is."""
        if self.path is None:
            return
        begin = time.monotonic()
        save_arrays(self.path, {**self.columns, "__done__": self.done}, {"identity": self.identity})
        self._kept, self._waiting = time.monotonic(), False
        self._cost = self._kept - begin

    def remove(self) -> None:
        """Delete the file, once its content is safe elsewhere."""
        self._waiting = False
        if self.path is not None:
            self.path.unlink(missing_ok=True)
