"""The model and the pairs that a score table was made from, found again and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    kinds = ("run", "identity", "source", "counts")
    run, identity, source, counts = (table.metadata.get(key, {}) for key in kinds)
    pairs = _rows(data, source, counts["scored"] + counts["skipped"], problems)
    rows = (
        pairs
        if isinstance(pairs, list) and all(isinstance(row, Mapping) for row in pairs)
        else None
    )
    if not model:
        return Scored(rows, None, None, tuple(problems))
    policy = _policy(policy, run, identity, revision, problems)
    if policy is None or pairs is None:
        return Scored(rows, policy, None, tuple(problems))
    try:
        longest = None if isinstance(pairs, Encoded) else source.get("max_length")
        encoded = encoded_for(policy, pairs, longest)
    except ValueError as error:
        problems.append(f"The data do not go with the model: {error}.")
        return Scored(None, policy, None, tuple(problems))
    if encoded.digest() != identity["data"]:
        name = (
            source.get("data")
            if data is None
            else data
            if isinstance(data, str | Path)
            else "given"
        )
        problems.append(
            f"The data ({name}) are not those that were scored: token ids differ. Name the scored "
            "ones with --data."
        )
        return Scored(None, policy, None, tuple(problems))
    return Scored(
        rows, policy, dict(zip(encoded.indices, encoded.pairs, strict=True)), tuple(problems)
    )


def _rows(data: Any, source: Mapping[str, Any], count: int, problems: list[str]) -> Any:
    name = source.get("data") if data is None else data
    if name is None:
        problems.append("The table does not say where its data were read: name them with --data.")
        return None
    if isinstance(name, Encoded):
        return name
    try:
        rows = (
            read_rows(name, count, source.get("split") or "train")
            if isinstance(name, str | Path)
            else list(name)
        )
    except (ValueError, OSError) as error:
        problems.append(
            f"The data cannot be read: {str(error).rstrip('.')}. Name them with --data."
        )
        return None
    if len(rows) < count:
        problems.append(
            f"The data have {len(rows)} rows, but {count} were read for scoring: name them with "
            "--data."
        )
        return None
    return rows[:count]


def _policy(
    policy: Policy | str | Path | None,
    run: Mapping[str, Any],
    identity: Mapping[str, str],
    revision: str | None,
    problems: list[str],
) -> Policy | None:
    if not isinstance(policy, Policy):
        try:
            policy = load(policy or run["model"], run["dtype"], revision)
        except (ValueError, OSError) as error:
            problems.append(
                f"The model cannot be loaded: {str(error).rstrip('.')}. Name it with --model."
            )
            return None
    now = policy_parts(policy)
    parts = {name.partition(".")[0] for name in now}
    scored = {k: v for k, v in identity.items() if k.partition(".")[0] in parts}
    if differ := differences(scored, now):
        problems.append(
            f"The model ({policy.name}, {policy.config.dtype}) is not the one that scored ("
            f"{differ}): name the scored one with --model."
        )
        return None
    return policy
