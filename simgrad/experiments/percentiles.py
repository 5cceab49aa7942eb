"""``percentiles`` measured: which score predicts Δlog π of the chosen response, pair by pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from simgrad.dynamics import directional_score
from simgrad.dynamics.agreement import percentile_means, spearman
from simgrad.dynamics.predictors import Setting
from simgrad.experiments.comparison import CAPTION, Comparison, compare
from simgrad.experiments.findings import Claim, Findings, Table
from simgrad.worlds.percentiles import Percentiles

SCORES = (
    "edit distance",
    "last-hidden inner",
    "CHES",
    "ln-CHES",
    "head gap",
    "full gap",
    "directional",
)

"""Predictors of a pair that are read before training, and the direction of the whole run."""

_RUNS = ("kernel flow", "kernel flow, ray", "kernel flow, refreshed", "two big steps")


def run(world: Percentiles, seeds: Sequence[int]) -> Findings:
    """Every predictor in the three settings, and mean changes at the percentiles of the scores."""
    rows, windows, samples = [], [], []
    for label, seed, setting, found in compared(world, seeds):
        rows += found.rows(label, seed)
        windows += _windows(found, label, seed)
        if not setting.alone:
            samples += _samples(setting, found, label, seed)
    table = Table.of("predictors", CAPTION, ("setting", "predictor"), _grouped(rows, "predictor"))
    percentiles = Table.of(
        "percentiles",
        "Mean measured Δlog π (nats) of the eighth of the pairs around each percentile of a score; "
        "a score that ranks displacement makes it fall from left to right (100 %: said to fall "
        "most).",
        ("setting", "score"),
        _grouped(windows, "score"),
    )
    sampling = Table.of(
        "samples",
        "The directional score when its direction has seen only some of the pairs: rank "
        "correlation with the measured Δlog π, root mean square of its deviation from the score of "
        "all pairs, and of the stated error (nats).",
        ("setting", "pairs seen"),
        _grouped(samples, "pairs seen"),
    )
    tables = (table, percentiles, sampling)
    return Findings.of(world, seeds, tables, _claims(table, percentiles))


def compared(
    world: Percentiles, seeds: Sequence[int], predictors: Sequence[str] | None = None
) -> Iterator[tuple[str, int, Setting, Comparison]]:
    """Every seed's three settings, trained and predicted (None: by every predictor)."""
    for (apply, theta), seed in zip(world.each_policy(seeds), seeds, strict=True):
        for label, setting in world.settings(apply, theta, seed).items():
            yield label, seed, setting, compare(setting, predictors)


def _grouped(rows: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """Rows by setting, then by ``what``, in order of appearance; seeds last."""
    settings, whats = (list(dict.fromkeys(row[key] for row in rows)) for key in ("setting", what))
    return sorted(
        rows, key=lambda row: (settings.index(row["setting"]), whats.index(row[what]), row["seed"])
    )


def _windows(found: Comparison, label: str, seed: int) -> list[dict[str, Any]]:
    """Razin et al.'s picture: the mean change of pairs near five percentiles of a score."""
    rows = []
    for name in SCORES:
        means = percentile_means(found.predicted[name], found.measured).tolist()
        steps = {f"{25 * k} %": mean for k, mean in enumerate(means)}
        ordered = float(np.all(np.diff(means) < 0))
        rows.append({"setting": label, "score": name, "seed": seed, **steps, "ordered": ordered})
    return rows


def _samples(setting: Setting, found: Comparison, label: str, seed: int) -> list[dict[str, Any]]:
    s, whole, rows = setting, found.predicted["directional"], []
    n = s.batch.size
    for sample in sorted({max(4, n // 8), max(4, n // 4), max(4, n // 2), n}):
        score = directional_score(s.apply, s.theta, s.batch, s.recipe, sample=sample, seed=seed)
        change, error = (np.asarray(x[:, 0], float) for x in (score.change, score.error))
        rows.append(
            {
                "setting": label,
                "pairs seen": sample,
                "seed": seed,
                "spearman": spearman(change, found.measured),
                "deviation": float(np.sqrt(np.mean((change - whole) ** 2))),
                "stated error": float(np.sqrt(np.mean(error**2))),
            }
        )
    return rows


def _claims(table: Table, percentiles: Table) -> tuple[Claim, ...]:
    def mean(setting: str, predictor: str, column: str = "spearman") -> float:
        return float(np.nanmean(table.where(setting=setting, predictor=predictor)[column]))

    def ordered(score: str) -> float:
        return float(percentiles.where(setting=alone, score=score)["ordered"].mean())

    sgd, adam, alone = "together, SGD", "together, Adam", "alone, SGD"
    return (
        Claim.of(
            "trained alone, the full gap ranks better than CHES",
            mean(alone, "full gap") > mean(alone, "CHES"),
            f"{mean(alone, 'full gap'):.2f} against {mean(alone, 'CHES'):.2f}",
        ),
        Claim.of(
            "trained alone, Δlog π falls with every percentile of CHES on most seeds",
            ordered("CHES") > 0.5,
            f"on {ordered('CHES'):.0%} of the seeds; of the full gap on {ordered('full gap'):.0%}",
        ),
        Claim.of(
            "trained together, CHES does not rank the pairs (Spearman below .5)",
            max(mean(sgd, "CHES"), mean(adam, "CHES")) < 0.5,
            f"SGD {mean(sgd, 'CHES'):.2f}, Adam {mean(adam, 'CHES'):.2f}",
        ),
        Claim.of(
            "the directional score does (at least .9 under SGD)",
            mean(sgd, "directional") >= 0.9,
            f"SGD {mean(sgd, 'directional'):.2f}, Adam {mean(adam, 'directional'):.2f}",
        ),
        Claim.of(
            "whole-run predictions reach .97 (SGD) and .95 (Adam)",
            (max(mean(sgd, p) for p in _RUNS) >= 0.97)
            & (max(mean(adam, p) for p in _RUNS) >= 0.95),
            "; ".join(f"{p}: {mean(sgd, p):.3f}, {mean(adam, p):.3f}" for p in _RUNS),
        ),
    )
