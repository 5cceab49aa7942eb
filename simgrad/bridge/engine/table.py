"""Tables of scores and predictions: one row a pair, in input order, with what made them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simgrad.bridge.preferences.encoding import Skipped
from simgrad.errors import InputError
from simgrad.store import Columns, write, write_parquet

_KEY = b"simgrad"


@dataclass(frozen=True, repr=False)
class ScoreTable(Columns):
    """Scores as arrays: ``table["ches"]``.

    Attributes:
        columns: one array a column, all of the same length.
        skipped: rows that could not be scored, with reasons.
        metadata: ``kind`` (score or prediction), ``run`` (the arguments), ``identity`` (all that
            the numbers depend on, see :func:`simgrad.store.identity`), ``source`` (where the data
            were read), ``provenance`` (versions, device) and ``counts``.
    """

    skipped: tuple[Skipped, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write a parquet file at once; skipped rows go to ``<stem>.skipped.jsonl``."""
        path = Path(path)
        skipped = path.with_name(f"{path.stem}.skipped.jsonl")
        lines = "".join(
            json.dumps({"index": s.index, "reason": s.reason}) + "\n" for s in self.skipped
        )
        write(skipped, lines)
        write_parquet(path, self.columns, self.metadata)

    @classmethod
    def load(cls, path: str | Path) -> ScoreTable:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: not a file that :meth:`save` wrote.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path)
        try:
            table = pq.read_table(path)
            metadata = json.loads((table.schema.metadata or {})[_KEY])
            if not isinstance(metadata, dict):
                raise KeyError(_KEY)
        except (pa.ArrowInvalid, KeyError, ValueError) as error:
            raise InputError(f"{path} is not a score table of simgrad") from error
        columns = {name: table[name].to_numpy() for name in table.column_names}
        skipped = path.with_name(f"{path.stem}.skipped.jsonl")
        try:
            lines = skipped.read_text(encoding="utf-8").splitlines() if skipped.exists() else []
            reasons = tuple(Skipped(**json.loads(line)) for line in lines)
        except (ValueError, TypeError) as error:
            raise InputError(f"{skipped} is damaged ({error}): delete it") from error
        return cls(columns, reasons, metadata)

    def __repr__(self) -> str:
        kind = self.metadata.get("kind", "score")
        names = ", ".join(self.columns)
        return f"<{kind} table of {len(self)} pairs, {len(self.skipped)} skipped: {names}>"
