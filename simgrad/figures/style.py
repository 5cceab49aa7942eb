"""One look for every figure: style sheet, venue widths, and the two colours that never change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from tueplots import figsizes

__all__ = ["CHOSEN", "GUIDE", "REJECTED", "paper_style", "size"]

CHOSEN, REJECTED = "#0072B2", "#D55E00"
"""Okabe-Ito blue and vermilion: told apart under every common colour blindness."""
GUIDE = "#888888"
_SHEET = Path(__file__).with_name("simgrad.mplstyle")


@contextmanager
def paper_style() -> Iterator[None]:
    """Matplotlib settings of the gallery, for the duration of a with block."""
    with mpl.rc_context(fname=_SHEET):
        yield


def size(rows: int, columns: int, height_to_width: float = 0.8) -> tuple[float, float]:
    """Figure size in inches: full text width of NeurIPS, panels of the given proportion."""
    bundle = figsizes.neurips2024(nrows=rows, ncols=columns, height_to_width_ratio=height_to_width)
    return bundle["figure.figsize"]
