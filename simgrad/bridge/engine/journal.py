"""An append-only record of finished pairs, so that an interrupted run loses nothing.

The file holds one JSON object a line: first the run's arguments, then one line a pair. Lines are
written and synced a batch at a time; a torn last line (the process was killed while writing) is
cut. Of many processes the first one writes, and what it finds is what all continue with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from simgrad.bridge.engine.processes import gathered, is_first, on_first

__all__ = ["Journal", "RunMismatchError", "check_same_processes", "check_same_run"]


class RunMismatchError(ValueError):
    """Results of another run are in the way."""


def check_same_run(path: Path, stored: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Refuse to mix: raise unless ``stored`` and ``run`` are the same arguments."""
    if differ := _differences(stored, run, "there", "now"):
        raise RunMismatchError(
            f"{path} belongs to a run with other arguments ({differ}). Choose another --out or "
            "delete it"
        )


def check_same_processes(run: Mapping[str, Any]) -> None:
    """Raise on every process unless all of them were given the same arguments."""
    runs = [json.loads(text) for text in gathered(json.dumps(run).encode())]
    for process, other in enumerate(runs):
        if differ := _differences(runs[0], other, "on process 0", f"on process {process}"):
            raise RunMismatchError(
                f"the processes were started with different arguments ({differ})"
            )


def _differences(first: Mapping[str, Any], second: Mapping[str, Any], one: str, other: str) -> str:
    differ = sorted(k for k in {*first, *second} if first.get(k) != second.get(k))
    return "; ".join(f"{k}: {first.get(k)!r} {one}, {second.get(k)!r} {other}" for k in differ)


class Journal:
    """Results by pair number, kept on disk; a context manager that holds a lock on the file."""

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self.path = path
        self._run = dict(run)
        self._lock = FileLock(f"{path}.lock")
        self.done: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> Journal:
        """Read what an earlier run left, or begin."""
        self.done = on_first(self._open)
        return self

    def _open(self) -> dict[int, dict[str, Any]]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RunMismatchError(f"{self.path} is in use by another process") from error
        try:
            if self.path.exists():
                self._read()
            self._file = self.path.open("a", encoding="utf-8")
            if self._file.tell() == 0:
                self._append([{"run": self._run}])
        except BaseException:
            self._unlock()
            raise
        return self.done

    def __exit__(self, *_: object) -> None:
        """Close the file; it stays until :meth:`remove`."""
        if is_first():
            self._file.close()
            self._unlock()

    def _unlock(self) -> None:
        if (
            os.name == "posix"
        ):  # while it is still held, so that nobody locks a file that is about to go
            Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def add(self, results: Mapping[int, Mapping[str, Any]]) -> None:
        """Record finished pairs and force them to disk."""
        if is_first():
            self._append([{"pair": i, **result} for i, result in results.items()])
        self.done.update({i: dict(result) for i, result in results.items()})

    def remove(self) -> None:
        """Delete the file, once its content is safe elsewhere."""
        self.path.unlink(missing_ok=True)

    def _append(self, records: list[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(record) + "\n" for record in records))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        for number, line in enumerate(whole.decode("utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
                if number == 1:
                    check_same_run(self.path, record["run"], json.loads(json.dumps(self._run)))
                else:
                    self.done[record.pop("pair")] = record
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise RunMismatchError(
                    f"{self.path}, line {number} is damaged: delete the file to start over"
                ) from error
