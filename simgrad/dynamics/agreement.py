"""How well a prediction agrees with what training did to the chosen responses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from simgrad.typing import Float

WORST = 10


@dataclass(frozen=True)
class Agreement:
    """Numbers that compare a prediction with measured Δlog π, over pairs.

    Attributes:
        spearman: rank correlation; nan where either side is constant.
        partial: rank correlation with response lengths partialled out.
        r2: 1 - Σ(measured - predicted)²/Σ(measured - mean)²; nan for scores that are no nats.
        precision: share of the ten predicted to fall most that are among the ten that fell most (of
            all pairs when there are fewer than 20: the worse half).
        sign: share of pairs whose rise or fall is predicted; nan for scores that are no nats.
    """

    spearman: float
    partial: float
    r2: float
    precision: float
    sign: float


def agreement(
    predicted: Float[np.ndarray, " B"],
    measured: Float[np.ndarray, " B"],
    lengths: Float[np.ndarray, "B k"] | None = None,
    nats: bool = True,
) -> Agreement:
    """Compare a prediction (higher: rises more) with the measured changes of the same pairs.

    >>> import numpy as np
    >>> a = agreement(np.array([0.1, -1.0, 2.0]), np.array([0.2, -3.0, 1.0]))
    >>> a.spearman, a.sign
    (1.0, 1.0)

    Raises:
        ValueError: arrays of different length, or fewer than two pairs.
    """
    x, y = np.asarray(predicted, float), np.asarray(measured, float)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise ValueError(
            f"two arrays of one length, at least 2, are needed, got shapes {x.shape} and {y.shape}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return Agreement(*[float("nan")] * 5)
    k = min(WORST, len(x) // 2)
    worst = [set(np.argsort(z, kind="stable")[:k]) for z in (x, y)]
    spread = ((y - y.mean()) ** 2).sum()
    return Agreement(
        spearman=spearman(x, y),
        partial=float("nan") if lengths is None else partial_spearman(x, y, lengths),
        r2=float(1 - ((y - x) ** 2).sum() / spread) if nats and spread > 0 else float("nan"),
        precision=len(worst[0] & worst[1]) / k if np.ptp(x) > 0 else float("nan"),
        sign=float(((x < 0) == (y < 0)).mean()) if nats else float("nan"),
    )


def spearman(x: Float[np.ndarray, " B"], y: Float[np.ndarray, " B"]) -> float:
    """Rank correlation; nan where either side is constant up to rounding.

    >>> import numpy as np
    >>> spearman(np.array([1.0, 2.0, 5.0]), np.array([-1.0, 3.0, 4.0]))
    1.0
    """
    if min(np.ptp(v) / (np.abs(v).max() + 1e-30) for v in (x, y)) < 1e-9:
        return float("nan")
    return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])


def partial_spearman(
    x: Float[np.ndarray, " B"], y: Float[np.ndarray, " B"], given: Float[np.ndarray, "B k"]
) -> float:
    """Pearson correlation of the residuals of ranks after a linear fit on the ranks of ``given``.

    nan where nothing is left to correlate.

    >>> import numpy as np
    >>> z = np.arange(8.0)
    >>> np.isnan(partial_spearman(z, z**3, z[:, None])).item()  # all of it is the third variable
    True
    """
    given = np.asarray(given, float)
    columns = [np.ones(len(given))] + [stats.rankdata(c) for c in given.T if np.ptp(c) > 0]
    basis = np.stack(columns, 1)
    left = [
        r - basis @ np.linalg.lstsq(basis, r, rcond=None)[0]
        for r in (stats.rankdata(x), stats.rankdata(y))
    ]
    sizes = [np.linalg.norm(r) for r in left]
    if min(sizes) < 1e-8 * len(given):
        return float("nan")
    return float(left[0] @ left[1] / (sizes[0] * sizes[1]))


def percentile_means(
    predicted: Float[np.ndarray, " B"],
    measured: Float[np.ndarray, " B"],
    percentiles: int = 5,
    share: float = 0.125,
) -> Float[np.ndarray, " P"]:
    """Mean measured change of the pairs around evenly spaced percentiles of a prediction.

    From the pairs predicted to rise most to those predicted to fall most; each mean is over
    ``share`` of the pairs. Of a prediction that ranks displacement the means fall from entry to
    entry.

    Source: the percentiles of CHES in Razin et al., arXiv 2410.08847, Sec. 5.

    >>> import numpy as np
    >>> percentile_means(np.arange(8.0), np.arange(8.0) ** 2, percentiles=3).tolist()
    [49.0, 9.0, 0.0]

    Raises:
        ValueError: arrays of different length.
    """
    if np.shape(predicted) != np.shape(measured):
        raise ValueError(
            f"one measured change a prediction: shapes {np.shape(predicted)} and "
            f"{np.shape(measured)}"
        )
    order = np.argsort(-np.asarray(predicted), kind="stable")
    width = max(1, int(share * len(order)))
    starts = np.linspace(0, len(order) - width, percentiles).round().astype(int)
    return np.array([np.asarray(measured)[order[s : s + width]].mean() for s in starts])
