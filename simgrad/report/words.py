"""What the report says in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

from simgrad.report.charts import number
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
            "gradients "
            "(simgrad score without --no-gradients).",
        )
    falling, low, high = numbers.falling
    both_rise = s.regimes.get("both_rise", 0)
    alone = f"when each is trained alone by a small SGD step of {what}"
    if falling:
        whose = "its" if falling == 1 else "their"
        known, percent = numbers.finite, 100 * falling / numbers.finite
        title = f"{falling} of {_pairs(known)} would, trained alone, lose {whose} chosen response"
        interval = f" (95 % interval {100 * low:.0f} to {100 * high:.0f} %"
        interval += ", were the pairs a random sample)"
        interval = interval if known > 1 else ""
        text = f"That is {percent:.0f} %{interval}, {alone}, to first order."
    else:
        title = (
            f"No pair of {s.scored}, trained alone, would lose its chosen response"
            if s.scored > 1
            else "The chosen response rises"
        )
        text = f"That is {alone}, to first order."
    if both_rise:
        text += f" In {_pairs(both_rise)} the rejected response rises too."
    return Headline(title, text)


def associations_sentence(numbers: ReportNumbers) -> str:
    """The strongest confound with lengths, and which score still ranks the change without them."""
    known = [
        a
        for a in numbers.associations
        if a.score not in ("gap", "predicted_dlogp_chosen", "predicted_dlogp_rejected")
    ]
    if not known:
        return ""
    tried = len(known)
    texts = []

    def strongest(a: Association) -> tuple[float, str]:
        options = {
            "the prompt's length": a.prompt,
            "the chosen's length": a.chosen,
            "the rejected's length": a.rejected,
            "|y_w| − |y_l|": a.difference,
        }
        best = max(options, key=lambda k: -1.0 if math.isnan(options[k]) else abs(options[k]))
        return options[best], best

    confounded = [(a, *strongest(a)) for a in known]
    confounded = [
        (a, rho, what)
        for a, rho, what in confounded
        if abs(rho) > max(0.5, chance(a.pairs, 4 * tried))
    ]
    if confounded:
        a, rho, what = max(confounded, key=lambda item: abs(item[1]))
        others = [b.label for b, _, _ in confounded if b is not a]
        texts.append(
            f"{a.label} follows {what} most closely (ρ = {correlation(rho)})"
            + (
                f"; {', '.join(others)} {'follow' if len(others) > 1 else 'follows'} a length with "
                "|ρ| > .5 too."
                if others
                else "."
            )
        )
    else:
        texts.append("No score follows a length with |ρ| > .5.")
    if ranked := [a for a in known if abs(a.partial) > chance(a.pairs, tried, 3)]:
        best = max(ranked, key=lambda a: abs(a.partial))
        texts.append(
            f"With lengths partialled out, {best.label} ranks the predicted Δ log π(chosen) best "
            "of these "
            f"(ρ = {correlation(best.partial)}; {correlation(best.change)} before)."
        )
    elif numbers.gradients:
        texts.append(
            "With lengths partialled out, none of them ranks the predicted Δ log π(chosen) beyond "
            "chance."
        )
    return " ".join(texts)


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
    t = float(stats.t.ppf(1 - 0.025 / tried, free))
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
    scored = next(o for o in numbers.objectives if o.names[0].startswith("as scored"))
    now = scored.regimes["ideal"]
    text = (
        f"Of the library's objectives at their defaults, {_listing(best.names, 'and')} "
        f"{'keep' if len(best.names) > 1 else 'keeps'} most pairs ideal: {best.regimes['ideal']} "
        f"of {n}; "
        f"as scored it is {now}."
    )
    fewest = min(
        named, key=lambda o: (o.regimes["both_fall"] + o.regimes["reversed"], -o.regimes["ideal"])
    )
    falls = fewest.regimes["both_fall"] + fewest.regimes["reversed"]
    if fewest is not best:
        rises = fewest.regimes["both_rise"]
        text += (
            f" Fewest chosen fall under {_listing(fewest.names, 'or')} ({falls} of {n}), at the "
            "price of "
            f"{rises} rejected that rise."
        )
    return text


def _listing(names: Sequence[str], word: str) -> str:
    first, last = (
        (names[:3], f"{len(names) - 3} more") if len(names) > 4 else (names[:-1], names[-1])
    )
    return f"{', '.join(first)} {word} {last}" if first else last


def strength_sentence(numbers: ReportNumbers) -> str:
    """The factor on d_w/d_l that keeps most pairs ideal, and how to get it."""
    found = numbers.strength
    if found is None:
        return ""
    now, best = found.at(1.0), found.at(found.best)
    if found.best == 1:
        return f"The strength as scored keeps as many pairs ideal as any: {100 * now[0]:.0f} %."
    (ideal, falls, rises), (ideal_now, falls_now, rises_now) = (
        [f"{100 * x:.0f} %" for x in y] for y in (best, now)
    )
    text = (
        f"At ×{number(found.best)}, {ideal} of the pairs are ideal ({ideal_now} as scored); the "
        "chosen then falls in "
        f"{falls} ({falls_now} as scored), the rejected rises in {rises} ({rises_now} as scored)."
    )
    if found.best > 1:
        ways = (
            f"shrinking the push on the rejected to {number(1 / found.best)} of what it is (from "
            "DPO: DPO-Shift with this λ)"
        )
        if found.pull is not None:
            low, high = (number((found.best - 1) * d, 2) for d in found.pull)
            weight = low if low == high else f"{low} (the median pair; {high} for 90 %)"
            ways = f"an SFT term of weight {weight} on the summed log-prob of the chosen, or {ways}"
        text += f" That is {ways}."
    return text
