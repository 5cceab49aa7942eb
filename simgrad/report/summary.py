"""What a score table says, in a few numbers a person can act on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from simgrad.bridge.engine.table import ScoreTable
from simgrad.theory import Regime

__all__ = ["Summary", "summarise"]


@dataclass(frozen=True)
class Summary:
    """Counts, worst pairs and remedies of a table.

    Attributes:
        scored: rows in the table.
        skipped: reason to number of rows kept out.
        merged: responses tokenised apart from their prompt.
        truncated: responses cut at the length limit.
        regimes: label to number of pairs (empty without gradients).
        order: the column that ranks the worst pairs, and its direction in words.
        worst: positions in the table of the worst pairs, worst first.
        ratio: the least d_w/d_l that keeps the chosen from falling, ⟨g_w,g_l⟩/‖g_w‖², at the median
            and at the 90th percentile of the pairs where it falls now (None where none falls).
        advice: sentences.
    """

    scored: int
    skipped: Mapping[str, int]
    merged: int
    truncated: int
    regimes: Mapping[str, int]
    order: str
    worst: np.ndarray
    ratio: tuple[float, float] | None
    advice: tuple[str, ...]


def summarise(table: ScoreTable, worst: int = 5) -> Summary:
    """Summary of a table of :func:`simgrad.score`."""
    reasons: dict[str, int] = {}
    for row in table.skipped:
        kind = row.reason.split(":")[0].split(" after")[0]
        reasons[kind] = reasons.get(kind, 0) + 1
    counts = table.metadata["counts"]
    exact = "predicted_dlogp_chosen" in table
    key = table["predicted_dlogp_chosen"] if exact else -table["ches"]
    regimes = {r.label: int((table["regime"] == r.label).sum()) for r in Regime} if exact else {}
    ratio = _ratio(table) if exact and len(table) else None
    return Summary(
        scored=len(table),
        skipped=dict(sorted(reasons.items(), key=lambda item: -item[1])),
        merged=counts["merged"],
        truncated=counts["truncated"],
        regimes=regimes,
        order="lowest predicted change of log π(chosen)" if exact else "highest CHES",
        worst=np.argsort(key, kind="stable")[:worst],
        ratio=ratio,
        advice=_advice(table, ratio, exact),
    )


def _ratio(table: ScoreTable) -> tuple[float, float] | None:
    falling = table["predicted_dlogp_chosen"] < 0
    if not falling.any():
        return None
    need = table["grad_inner"][falling] / table["grad_sq_chosen"][falling]
    return float(np.median(need)), float(np.quantile(need, 0.9))


def _advice(table: ScoreTable, ratio: tuple[float, float] | None, exact: bool) -> tuple[str, ...]:
    if not len(table):
        return ("No pair could be scored: see the reasons above.",)
    if not exact:
        return (
            "CHES grows with response length: compare ln_ches too, and score with gradients for "
            "signs and sizes.",
        )
    shared = (
        "These are each pair's own effect; in joint training the other pairs of a batch add theirs."
    )
    if ratio is None:
        return ("No pair lowers its own chosen response to first order.", shared)
    median, high = ratio
    share = f"a ratio of at least {high:.2f} keeps 90 % of the falling pairs from falling"
    if high > median:
        share = f"a ratio of at least {median:.2f} keeps half of the falling pairs from falling, {high:.2f} keeps 90 %"
    advice = [
        f"Pull harder on the chosen, relative to the push on the rejected (d_w/d_l): {share}."
    ]
    pull = float(np.median(table["d_rejected"]))
    if pull > 0 and high > 1:
        advice.append(
            "An SFT term of weight λ on the summed log-prob adds λ to d_w: λ ≈ "
            f"{(high - 1) * pull:.3g} gives "
            f"{high:.2f}; so does shrinking the push on the rejected (DPO-Shift, λ = "
            f"{1 / high:.2f})."
        )
    advice.append("Or drop the worst pairs, those with predicted_dlogp_chosen < 0.")
    return (*advice, shared)
