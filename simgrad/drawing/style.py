"""One look for every figure: style sheet, venue widths, and the two colours that never change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from tueplots import figsizes

__all__ = ["CHOSEN", "GUIDE", "OTHERS", "REJECTED", "paper_style", "size", "use"]

CHOSEN = "#0072B2"
"""Of everything chosen: Okabe and Ito's blue, told from vermilion in colour blindness too."""
REJECTED = "#D55E00"
"""Of everything rejected: their vermilion."""
OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The rest of that palette, for what is neither chosen nor rejected."""
GUIDE = "#888888"
"""Grey, for lines that only guide the eye."""
_SHEET = Path(__file__).with_name("simgrad.mplstyle")
_VENUES = {
    "neurips": figsizes.neurips2024,
    "icml": figsizes.icml2024_full,
    "iclr": figsizes.iclr2024,
}


@contextmanager
def paper_style(venue: str = "neurips") -> Iterator[None]:
    """Matplotlib settings of the gallery at a venue's full text width, within a with block.

    Raises:
        ValueError: unknown venue.
    """
    if venue not in _VENUES:
        raise ValueError(f"no venue {venue!r}; there are: {', '.join(_VENUES)}")
    with mpl.rc_context(fname=_SHEET):
        mpl.rcParams["figure.figsize"] = _VENUES[venue]()["figure.figsize"]
        yield


def use() -> None:
    """The gallery's settings for a whole notebook, with larger letters.

    >>> import matplotlib as mpl
    >>> with mpl.rc_context():
    ...     use()
    ...     mpl.rcParams["axes.spines.top"]
    False
    """
    plt.style.use(_SHEET)
    plt.rc("font", size=9)
    plt.rc("axes", titlesize=9, labelsize=9)
    plt.rc("xtick", labelsize=8)
    plt.rc("ytick", labelsize=8)
    plt.rc("legend", fontsize=8)
    plt.rc("figure", figsize=(6.5, 3.0), dpi=110)


def size(rows: int, columns: int, height_to_width: float = 0.8) -> tuple[float, float]:
    """Figure size in inches: the full width of the style in use, panels of the given proportion."""
    width = mpl.rcParams["figure.figsize"][0]
    return width, width / columns * height_to_width * rows
