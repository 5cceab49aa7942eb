"""What a score or prediction table says, in a few numbers a person can act on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from simgrad.bridge.engine.columns import PREDICTION_COLUMNS, SCORE_COLUMNS, Column
from simgrad.bridge.engine.table import ScoreTable
from simgrad.report.mitigations import Needed, needed
from simgrad.theory import Regime

_PAIR = "index n_chosen n_rejected logp_chosen"
_EXACT = f"{_PAIR} ln_ches grad_cosine predicted_dlogp_chosen regime"
_FORWARD = f"{_PAIR} ln_ches ches head_gap"
_PREDICTED = "index logp_chosen predicted_dlogp_chosen error_chosen predicted_dlogp_rejected"
_SIDES = ("chosen", "rejected")
_MEANINGLESS = 12  # nats, beyond which sizes that a direction predicts mean little


def _shown(columns: Sequence[Column], names: str) -> tuple[Column, ...]:
    known = {column.name: column for column in columns}
    return tuple(known[name] for name in names.split())


@dataclass(frozen=True)
class Summary:
    """Counts, worst pairs and mitigations of a table.

    Attributes:
        scored: rows in the table.
        skipped: reason to number of rows kept out.
        merged: responses tokenised apart from their prompt.
        truncated: responses cut at the length limit.
        regimes: label to number of pairs (empty without gradients).
        order: the column that ranks the worst pairs, and its direction in words.
        worst: positions in the table of the worst pairs, worst first.
        columns: what is shown of them.
        needed: what keeps the falling chosen responses from falling (None where none falls).
        advice: sentences.
    """

    scored: int
    skipped: Mapping[str, int]
    merged: int
    truncated: int
    regimes: Mapping[str, int]
    order: str
    worst: np.ndarray
    columns: tuple[Column, ...]
    needed: Needed | None
    advice: tuple[str, ...]


def summarise(table: ScoreTable, worst: int = 5) -> Summary:
    """Summary of a table of :func:`simgrad.score`."""
    reasons = Counter(row.reason.split(":")[0].split(" after")[0] for row in table.skipped)
    counts = table.metadata["counts"]
    exact = "predicted_dlogp_chosen" in table
    key = table["predicted_dlogp_chosen"] if exact else -table["ches"]
    regimes = {r.label: int((table["regime"] == r.label).sum()) for r in Regime} if exact else {}
    need = needed(table) if exact and len(table) else None
    return Summary(
        scored=len(table),
        skipped=dict(reasons.most_common()),
        merged=counts["merged"],
        truncated=counts["truncated"],
        regimes=regimes,
        order="lowest predicted change of log π(chosen)" if exact else "highest CHES",
        worst=np.argsort(key, kind="stable")[:worst],
        columns=_shown(SCORE_COLUMNS, _EXACT if exact else _FORWARD),
        needed=need,
        advice=_advice(table, need, exact),
    )


@dataclass(frozen=True)
class PredictionSummary:
    """What a prediction says in a few lines.

    Attributes:
        steps: of the run.
        lines: sentences.
        worst: positions in the table of the pairs predicted to fall most, worst first.
        columns: what is shown of them.
    """

    steps: int
    lines: tuple[str, ...]
    worst: np.ndarray
    columns: tuple[Column, ...]


def summarise_prediction(table: ScoreTable, worst: int = 5) -> PredictionSummary:
    """Summary of a table of :func:`simgrad.bridge.predict`."""
    run, change = table.metadata["run"], table["predicted_dlogp_chosen"]
    lines = ["No pair is left: every number of it was not finite."]
    if len(change):
        both = (change < 0) & (table["predicted_dlogp_rejected"] < 0)
        lines = [
            f"{(change < 0).mean():.0%} of the chosen responses are predicted to fall, "
            f"{both.mean():.0%} together with their rejected one.",
            f"Δ log π of the chosen: median {np.median(change):.3g}, from {change.min():.3g} to "
            f"{change.max():.3g} nats.",
        ]
        if np.abs(change).max() > _MEANINGLESS:
            lines.append(
                f"Beyond about {_MEANINGLESS} nats sizes mean little, and the order is less sure."
            )
        above = [(table[f"logp_{s}"] + table[f"predicted_dlogp_{s}"] > 0).sum() for s in _SIDES]
        if sum(above):
            lines.append(
                f"{sum(above)} predicted log-probs are above 0: the run leaves the range in which "
                "this prediction holds."
            )
    names = _PREDICTED if run["sample"] else _PREDICTED.replace("error_chosen ", "")
    return PredictionSummary(
        int(run["steps"]),
        tuple(lines),
        np.argsort(change, kind="stable")[:worst],
        _shown(PREDICTION_COLUMNS, names),
    )


def _advice(table: ScoreTable, need: Needed | None, exact: bool) -> tuple[str, ...]:
    if not len(table):
        return ("No pair could be scored: see the reasons above.",)
    if not exact:
        return (
            "CHES grows with response length: compare ln_ches too, and score with gradients for "
            "signs and sizes.",
        )
    shared = (
        "All this is about each pair trained alone; in joint training the other pairs add their "
        "own effect, often the larger one: see simgrad predict."
    )
    if need is None:
        return ("No pair lowers its own chosen response to first order.", shared)
    advice = [shared]
    if need.ratio is not None:
        advice.append(
            "Pull harder on the chosen, relative to the push on the rejected (d_w/d_l): a ratio of "
            f"at least {_both(need.ratio)} of the falling pairs from falling."
        )
    advice.append(
        "An SFT term of weight λ on the summed log-prob adds λ to d_w: λ of at least "
        f"{_both(need.sft)} of the falling pairs from falling."
    )
    half, most = need.shift
    if half > 0:
        enough = f"{half:.3g} of what it is keeps half of them from falling" + (
            f", to {most:.3g} 90 %" if most > 0 else "; no factor keeps 90 %"
        )
        equal = np.allclose(table["d_chosen"], table["d_rejected"], rtol=1e-4)
        by = " (from DPO: DPO-Shift with this λ)" if equal else ""
        advice.append(f"Or shrink the push on the rejected: to {enough}{by}.")
    return (*advice, "Or drop the worst pairs, those with predicted_dlogp_chosen < 0.")


def _both(values: tuple[float, float]) -> str:
    half, most = values
    if half == most:
        return f"{most:.3g} keeps 90 %"
    return f"{half:.3g} keeps half, and {most:.3g} keeps 90 %,"
