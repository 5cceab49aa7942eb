"""Predictors held against what training did: one run, every prediction, one table."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from simgrad.dynamics.agreement import agreement
from simgrad.dynamics.predictors import PREDICTORS, RERUN, Setting, measured
from simgrad.experiments.findings import Table
from simgrad.typing import Float


@dataclass(frozen=True)
class Comparison:
    """One setting, measured and predicted; arrays over pairs, of the chosen responses, in nats.

    Attributes:
        measured: Δlog π_w by training.
        predicted: the same, or a score with its order, by predictor.
        seconds: each prediction's time, compilation included.
        lengths: response lengths.
        nats: of each predictor, whether it predicts sizes and signs here.
    """

    measured: Float[np.ndarray, " B"]
    predicted: dict[str, Float[np.ndarray, " B"]]
    seconds: dict[str, float]
    lengths: Float[np.ndarray, "B 2"]
    nats: dict[str, bool]

    def rows(self, label: str, seed: int = 0) -> list[dict[str, Any]]:
        """One row of :func:`simgrad.dynamics.agreement.agreement` a predictor."""
        return [
            {
                "setting": label,
                "predictor": name,
                "seed": seed,
                **dataclasses.asdict(
                    agreement(guess, self.measured, self.lengths, self.nats[name])
                ),
                "seconds": self.seconds[name],
                "largest |Δ|": float(np.abs(self.measured).max()),
            }
            for name, guess in self.predicted.items()
        ]


def compare(setting: Setting, predictors: Sequence[str] | None = None) -> Comparison:
    """Train a setting once and predict it by each predictor (None: all).

    The rerun is left out where the order of the pairs means nothing.

    Raises:
        ValueError: unknown predictor.
        DivergedError: the run does not stay finite.
    """
    names = list(PREDICTORS if predictors is None else predictors)
    if unknown := [name for name in names if name not in PREDICTORS]:
        raise ValueError(f"no predictor {unknown[0]!r}; there are: {', '.join(PREDICTORS)}")
    change = measured(setting)[:, 0].astype(float)
    predicted, seconds = {}, {}
    for name in names:
        if name == RERUN and (setting.alone or setting.recipe.batch_size is None):
            continue
        begin = time.perf_counter()
        predicted[name] = PREDICTORS[name](setting)[:, 0].astype(float)
        seconds[name] = time.perf_counter() - begin
    lengths = np.asarray(setting.batch.lengths, float)
    nats = {name: PREDICTORS[name].in_nats(setting) for name in predicted}
    return Comparison(change, predicted, seconds, lengths, nats)


CAPTION = (
    "Agreement with the measured Δlog π of the chosen responses: Spearman, the same with lengths "
    "partialled out, R² in nats, precision at the ten that fall most (of fewer than 20 pairs, at "
    "the worse half), share of signs."
)


def predictor_table(
    settings: Mapping[str, Setting], predictors: Sequence[str] | None = None
) -> Table:
    """How well each predictor predicts Δlog π of the chosen responses in each setting.

    Raises:
        ValueError: unknown predictor.
        DivergedError: a run does not stay finite.
    """
    rows = [
        row
        for label, setting in settings.items()
        for row in compare(setting, predictors).rows(label)
    ]
    return Table.of("predictors", CAPTION, ("setting", "predictor"), rows)
