"""What the report says in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from simgrad.drawing.draw import number
from simgrad.report.mitigations import ObjectiveFate
from simgrad.report.numbers import Association, ReportNumbers


@dataclass(frozen=True)
class Headline:
    """The first line of the page, and the one under it."""

    title: str
    text: str


def _pairs(n: int) -> str:
    return f"{n} pair" if n == 1 else f"{n} pairs"


def headline(numbers: ReportNumbers) -> Headline:
    """How many pairs lose their chosen response, and under what."""
    s, run = numbers.summary, numbers.metadata["run"]
    if not s.scored:
        return Headline("No pair could be scored", "Every row was left out; the reasons are below.")
    what = f"{run['objective']} on {Path(run['model']).name}"
    if not numbers.gradients:
        return Headline(
            f"{_pairs(s.scored)} scored without gradients",
            f"{what}. Similarities are here; which responses rise or fall is not: that needs "
            "gradients (simgrad score without --no-gradients).",
        )
    falling, low, high = numbers.falling
    alone = f"when each is trained alone by a small SGD step of {what}"
    title, text = "The chosen response rises", f"That is {alone}, to first order."
    if falling:
        whose, known = "its" if falling == 1 else "their", numbers.finite
        title = f"{falling} of {_pairs(known)} would, trained alone, lose {whose} chosen response"
        bounds = f"95 % interval {100 * low:.0f} to {100 * high:.0f} %"
        sure = f" ({bounds}, were the pairs a random sample)" if known > 1 else ""
        text = f"That is {100 * falling / known:.0f} %{sure}, {alone}, to first order."
    elif s.scored > 1:
        title = f"No pair of {s.scored}, trained alone, would lose its chosen response"
    if both_rise := s.regimes.get("both_rise", 0):
        text += f" In {_pairs(both_rise)} the rejected response rises too."
    return Headline(title, text)


def associations_sentence(numbers: ReportNumbers) -> str:
    """The strongest confound with lengths, and which score still ranks the change without them."""
    by_construction = (*numbers.by_construction, "predicted_dlogp_rejected")
    known = [a for a in numbers.associations if a.score not in by_construction]
    if not known:
        return ""
    texts, tried = ["No score follows a length with |ρ| > .5."], len(known)
    strongest = [(a, *_strongest(a)) for a in known]
    confounded = [x for x in strongest if abs(x[1]) > max(0.5, chance(x[0].pairs, 4 * tried))]
    if confounded:
        a, rho, what = max(confounded, key=lambda item: abs(item[1]))
        others = [b.label for b, _, _ in confounded if b is not a]
        follow = "follow" if len(others) > 1 else "follows"
        too = f"; {', '.join(others)} {follow} a length with |ρ| > .5 too." if others else "."
        texts = [f"{a.label} follows {what} most closely (ρ = {correlation(rho)}){too}"]
    if ranked := [a for a in known if abs(a.partial) > chance(a.pairs, tried, 3)]:
        best = max(ranked, key=lambda a: abs(a.partial))
        texts.append(
            f"With lengths partialled out, {best.label} ranks the predicted Δ log π(chosen) best "
            f"of these (ρ = {correlation(best.partial)}; {correlation(best.change)} before)."
        )
    elif numbers.gradients:
        texts.append(
            "With lengths partialled out, none of them ranks the predicted Δ log π(chosen) beyond "
            "chance."
        )
    return " ".join(texts)


def _strongest(a: Association) -> tuple[float, str]:
    """The largest of a score's correlations with lengths, and with what it is."""
    options = {
        "the prompt's length": a.prompt,
        "the chosen's length": a.chosen,
        "the rejected's length": a.rejected,
        "|y_w| − |y_l|": a.difference,
    }
    best = max(options, key=lambda what: np.nan_to_num(abs(options[what]), nan=-1.0))
    return options[best], best


def chance(pairs: int, tried: int = 1, given: int = 0) -> float:
    """|ρ| that the largest of ``tried`` unrelated rank correlations exceeds in ≤ 5 % of all tables.

    Student's t with n - 2 - k degrees of freedom, k numbers partialled out, Bonferroni over the
    tries.

    >>> round(chance(64), 2), round(chance(64, tried=7, given=3), 2)
    (0.25, 0.34)
    """
    free = pairs - 2 - given
    if free < 1:
        return 1.0
    t = float(stdtrit(free, 1 - 0.025 / tried))
    return t / math.sqrt(free + t * t)


def correlation(x: float) -> str:
    """Two decimals without the leading zero.

    >>> correlation(-0.94), correlation(-0.001), correlation(1.0), correlation(float("nan"))
    ('−.94', '.00', '1.00', '–')
    """
    if math.isnan(x):
        return "–"
    text = f"{abs(x):.2f}"
    return ("−" if x < 0 and float(text) else "") + text.removeprefix("0")


def objectives_sentence(numbers: ReportNumbers) -> str:
    """Which objectives keep most pairs ideal."""
    if not numbers.objectives:
        return ""
    named = [o for o in numbers.objectives if not o.names[0].startswith("as scored")]
    best, n = named[0], sum(named[0].regimes.values())
    keep = "keep" if len(best.names) > 1 else "keeps"
    text = (
        f"Of the library's objectives at their defaults, {_listing(best.names, 'and')} {keep} most "
        f"pairs ideal: {best.regimes['ideal']} of {n}; as scored it is "
        f"{numbers.summary.regimes['ideal']}."
    )

    def falling(fate: ObjectiveFate) -> int:
        return fate.regimes["both_fall"] + fate.regimes["reversed"]

    fewest = min(named, key=lambda fate: (falling(fate), -fate.regimes["ideal"]))
    if fewest is not best:
        text += (
            f" Fewest chosen fall under {_listing(fewest.names, 'or')} ({falling(fewest)} of {n}), "
            f"at the price of {fewest.regimes['both_rise']} rejected that rise."
        )
    return text


def _listing(names: Sequence[str], word: str) -> str:
    first, last = names[:-1], names[-1]
    if len(names) > 4:
        first, last = names[:3], f"{len(names) - 3} more"
    return f"{', '.join(first)} {word} {last}" if first else last


def strength_sentence(numbers: ReportNumbers) -> str:
    """The factor on d_w/d_l that keeps most pairs ideal, and how to get it."""
    found = numbers.strength
    if found is None:
        return ""
    ideal_now, falls_now, rises_now = (f"{100 * x:.0f} %" for x in found.at(1.0))
    ideal, falls, rises = (f"{100 * x:.0f} %" for x in found.at(found.best))
    if found.best == 1:
        return f"The strength as scored keeps as many pairs ideal as any: {ideal_now}."
    text = (
        f"At ×{number(found.best)}, {ideal} of the pairs are ideal ({ideal_now} as scored); the "
        f"chosen then falls in {falls} ({falls_now} as scored), the rejected rises in {rises} "
        f"({rises_now} as scored)."
    )
    if found.best < 1:
        return text
    ways = f"shrinking the push on the rejected to {number(1 / found.best)} of what it is"
    ways += " (from DPO: DPO-Shift with this λ)" if numbers.equal_forces else ""
    if found.pull is not None:
        low, high = (number((found.best - 1) * d, 2) for d in found.pull)
        weight = low if low == high else f"{low} (the median pair; {high} for 90 %)"
        ways = f"an SFT term of weight {weight} on the summed log-prob of the chosen, or {ways}"
    return f"{text} That is {ways}."
