"""The model and the pairs that a score table was made from, found again and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simgrad.bridge.checkpoints.policy import Policy, load
from simgrad.bridge.engine.run import policy_parts
from simgrad.bridge.engine.table import ScoreTable
from simgrad.bridge.preferences.encoding import Encoded
from simgrad.bridge.preferences.inputs import encoded_for
from simgrad.bridge.preferences.rows import read_rows
from simgrad.pairs import Pair
from simgrad.store import differences


@dataclass(frozen=True)
class Scored:
    """What was found of a table's origin.

    Attributes:
        rows: rows of the data, as many as the table speaks of; None if not found or of another
            kind.
        policy: the model that scored: its configuration, weights and tokenizer; None if not found,
            or not wanted.
        pairs: row number to its token ids, those that were scored; None unless policy and data are
            certain.
        problems: what is missing or differs, one sentence each.
    """

    rows: Sequence[Mapping[str, Any]] | None
    policy: Policy | None
    pairs: Mapping[int, Pair] | None
    problems: tuple[str, ...]


def find_scored(
    table: ScoreTable,
    policy: Policy | str | Path | None = None,
    data: str | Path | Sequence[Any] | Encoded | None = None,
    *,
    revision: str | None = None,
    model: bool = True,
) -> Scored:
    """Load the model and read the data of a score table, and hold them against its identity.

    Nothing is raised for what is missing or differs: it is left out, and ``problems`` names it.

    Args:
        table: whose origin is wanted.
        policy: the model or its name (None: the name in the table).
        data: the pairs, as for :func:`simgrad.score`, or their name (None: the name in the table).
        revision: Hub revision of the model.
        model: whether to load it. Without, token ids are unknown, and the rows are taken on trust.
    """
    problems: list[str] = []

    def attempt(find: Callable[..., Any], *given: Any) -> Any:
        try:
            return find(*given)
        except _NotFound as reason:
            problems.append(str(reason))
            return None

    pairs = attempt(_rows, data, table)
    mappings = isinstance(pairs, list) and all(isinstance(row, Mapping) for row in pairs)
    rows, found, members = pairs if mappings else None, None, None
    if model:
        found = attempt(_policy, policy, table, revision)
        if found is not None and pairs is not None:
            members = attempt(_members, found, pairs, data, table)
            rows = None if members is None else rows
    return Scored(rows, found, members, tuple(problems))


class _NotFound(Exception):
    """Why something cannot be used, as a sentence for the page."""


def _rows(data: Any, table: ScoreTable) -> Any:
    source, counts = table.metadata.get("source", {}), table.metadata["counts"]
    count, name = counts["scored"] + counts["skipped"], data
    if data is None:
        name = source.get("data")
    if name is None:
        raise _NotFound("The table does not say where its data were read: name them with --data.")
    if isinstance(name, Encoded):
        return name
    try:
        read = isinstance(name, str | Path)
        rows = read_rows(name, count, source.get("split") or "train") if read else list(name)
    except (ValueError, OSError) as error:
        text = str(error).rstrip(".")
        raise _NotFound(f"The data cannot be read: {text}. Name them with --data.") from None
    if len(rows) < count:
        raise _NotFound(
            f"The data have {len(rows)} rows, but {count} were read for scoring: name them with "
            "--data."
        )
    return rows[:count]


def _policy(policy: Policy | str | Path | None, table: ScoreTable, revision: str | None) -> Policy:
    run, identity = table.metadata["run"], table.metadata["identity"]
    if not isinstance(policy, Policy):
        try:
            policy = load(policy or run["model"], run["dtype"], revision)
        except (ValueError, OSError) as error:
            text = str(error).rstrip(".")
            raise _NotFound(f"The model cannot be loaded: {text}. Name it with --model.") from None
    now = policy_parts(policy)
    parts = {name.partition(".")[0] for name in now}
    scored = {k: v for k, v in identity.items() if k.partition(".")[0] in parts}
    if differ := differences(scored, now):
        raise _NotFound(
            f"The model ({policy.name}, {policy.config.dtype}) is not the one that scored ("
            f"{differ}): name the scored one with --model."
        )
    return policy


def _members(policy: Policy, pairs: Any, data: Any, table: ScoreTable) -> dict[int, Pair]:
    """Row number to token ids, if they are those that were scored."""
    source = table.metadata.get("source", {})
    try:
        longest = None if isinstance(pairs, Encoded) else source.get("max_length")
        encoded = encoded_for(policy, pairs, longest)
    except ValueError as error:
        raise _NotFound(f"The data do not go with the model: {error}.") from None
    if encoded.digest() != table.metadata["identity"]["data"]:
        name = source.get("data") if data is None else data
        raise _NotFound(
            f"The data ({name if isinstance(name, str | Path) else 'given'}) are not those that "
            "were scored: token ids differ. Name the scored ones with --data."
        )
    return dict(zip(encoded.indices, encoded.pairs, strict=True))
