"""Results on disk: what names a result, files that are always whole, and runs that continue.

A result is named by the full content of everything that makes it (:func:`identity`). Two runs with
the same identity give the same numbers, so that a stored result may stand for a computation, and an
interrupted run may go on (:class:`RowStore`).
"""

from simgrad.store.columns import Columns
from simgrad.store.content import digest
from simgrad.store.files import cache_folder, load_arrays, save_arrays, write, write_parquet
from simgrad.store.naming import (
    RunMismatchError,
    described,
    differences,
    identity,
    provenance,
    require_same,
)
from simgrad.store.rows import RowStore, locked
from simgrad.store.source import code

__all__ = [
    "Columns",
    "RowStore",
    "RunMismatchError",
    "cache_folder",
    "code",
    "described",
    "differences",
    "digest",
    "identity",
    "load_arrays",
    "locked",
    "provenance",
    "require_same",
    "save_arrays",
    "write",
    "write_parquet",
]
