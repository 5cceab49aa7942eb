"""What the arms of ``refusals`` say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from simgrad.experiments.findings import Claim, Table, interval

__all__ = ["refusal_claims", "refusal_rows"]


def refusal_rows(
    arm: str, pairs: int, steps: int, seeds: Sequence[int], rates: np.ndarray
) -> list[dict[str, Any]]:
    """One row a seed."""
    return [
        {
            "arm": arm,
            "pairs": pairs,
            "steps": steps,
            "seed": s,
            "refuses harmful": h,
            "refuses harmless": o,
        }
        for s, (h, o) in zip(seeds, rates.tolist(), strict=True)
    ]


def refusal_claims(arms: Table, rollouts: Table) -> tuple[Claim, ...]:
    """Statements about the arms, and whether they hold."""

    def rate(start: str, table: Table = arms) -> np.ndarray:
        names = [
            s["arm"] for s in table.settings() if s["arm"] == start or s["arm"].startswith(start)
        ]
        return table.where(arm=names[0])["refuses harmful"]

    def kept(name: str) -> tuple[np.ndarray, np.ndarray]:
        names = [
            s["arm"]
            for s in arms.settings()
            if name in s["arm"] and not s["arm"].startswith("highest")
        ]
        few, many = (
            next(n for n in names if n.endswith(", as many steps") == long)
            for long in (False, True)
        )
        return arms.where(arm=few)["refuses harmful"], arms.where(arm=many)["refuses harmful"]

    def says(values: np.ndarray) -> str:
        return str(interval(values))

    start, dpo = rate("start"), rate("DPO")
    begin, rolled = rate("start", rollouts), rate("DPO", rollouts)
    chance = kept("% random")
    filters = {
        name: kept(f"% {name}") for name in ("ln-CHES", "head gap", "full gap", "directional")
    }

    def better(which: int) -> tuple[bool | None, str]:
        won = {name: interval(values[which] - chance[which]) for name, values in filters.items()}
        text = "; ".join(f"{name} {x}" for name, x in won.items())
        return all(x.low > 0 for x in won.values()) if len(start) > 1 else None, text

    return (
        Claim("DPO at least halves the refusal rate on every seed", bool((dpo <= start / 2).all()),
              f"{says(start)} → {says(dpo)}, largest ratio {(dpo / start).max():.2f}"),
        Claim("the rule gives the direction: with random preferences refusal does not fall",
              bool((rate("random preferences") >= 0.9 * start).all()), says(rate("random preferences"))),
        Claim("an SFT term keeps the refusal rate within a tenth", bool((rate("SFT term") >= 0.9 * start).all()),
              says(rate("SFT term"))),
        Claim("every filter keeps more refusals than as many random pairs, at equal passes", *better(0)),
        Claim("and at equal steps", *better(1)),
        Claim("DPO on whole rollouts in natural proportions lowers refusal on every seed",
              bool((rolled < begin).all()), f"{says(begin)} → {says(rolled)}"),
        Claim("and halves it", bool((rolled <= begin / 2).all()), f"largest ratio {(rolled / begin).max():.2f}"),
    )  # fmt: skip
