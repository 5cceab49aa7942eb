"""Columns of one length by name: what every table of results is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Columns:
    """Columns as arrays: ``table["ches"]``.

    Attributes:
        columns: one array a column, all of the same length.
    """

    columns: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        """One column."""
        try:
            return self.columns[name]
        except KeyError:
            raise KeyError(f"no column {name!r}; there are: {', '.join(self.columns)}") from None

    def __contains__(self, name: object) -> bool:
        """Whether there is such a column."""
        return name in self.columns

    def __iter__(self) -> Iterator[str]:
        """Column names."""
        return iter(self.columns)

    def __len__(self) -> int:
        """Number of rows."""
        return len(next(iter(self.columns.values()), ()))

    def to_pandas(self):
        """The columns as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self.columns)
