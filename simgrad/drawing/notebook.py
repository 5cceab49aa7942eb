"""Figures with sliders for notebooks, which are there without sliders too."""

from __future__ import annotations

import base64
import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure


def explore(draw: Callable[..., Figure], **choices: Sequence[Any]) -> None:
    """Show ``draw`` at its defaults, with a slider for each argument that ``choices`` names.

    In a running notebook with ipywidgets a slider redraws the figure. Everywhere else (on GitHub,
    in HTML, in a file that was executed without a browser, without ipywidgets) the figure of the
    defaults stands in the same place.

    Args:
        draw: makes a figure; its defaults are what is shown first.
        **choices: for each argument the values of its slider, the default among them.

    Raises:
        ValueError: an argument that ``draw`` does not have, or whose default is not among its
            values.

    >>> def line(slope=1.0):
    ...     figure, axis = plt.subplots()
    ...     axis.plot([0, 1], [0, slope])
    ...     return figure
    >>> explore(line, slope=[0.5, 1.0, 2.0])  # doctest: +SKIP
    """
    start = _defaults(draw, choices)
    picture = _png(draw(**start))
    shown = {"text/plain": "<Figure>", "image/png": base64.b64encode(picture).decode()}
    from IPython.display import display

    display(_sliders(draw, start, choices, picture) | shown, raw=True)


def _defaults(draw: Callable[..., Figure], choices: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    parameters = inspect.signature(draw).parameters
    for name, values in choices.items():
        if name not in parameters:
            raise ValueError(f"draw has no argument {name!r}; it has: {', '.join(parameters)}")
        if parameters[name].default not in list(values):
            raise ValueError(
                f"{name}: the default {parameters[name].default!r} is not among {list(values)}"
            )
    return {name: parameters[name].default for name in choices}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def _sliders(
    draw: Callable[..., Figure],
    start: Mapping[str, Any],
    choices: Mapping[str, Sequence[Any]],
    picture: bytes,
) -> dict[str, Any]:
    """The picture below its sliders, as a notebook knows them; nothing without ipywidgets."""
    try:
        import ipywidgets
    except ImportError:
        return {}
    image = ipywidgets.Image(value=picture, format="png")
    sliders = {
        name: ipywidgets.SelectionSlider(
            options=[(f"{v:.4g}" if isinstance(v, float) else str(v), v) for v in values],
            value=start[name],
            description=name.replace("_", " "),
            continuous_update=False,
            style={"description_width": "initial"},
            layout={"width": "420px"},
        )
        for name, values in choices.items()
    }

    def redraw(_: Any) -> None:
        image.value = _png(draw(**{name: slider.value for name, slider in sliders.items()}))

    for slider in sliders.values():
        slider.observe(redraw, "value")
    return ipywidgets.VBox([*sliders.values(), image])._repr_mimebundle_() or {}
