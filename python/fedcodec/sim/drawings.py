"""Drawings that several studies share; make them within ``rc_context(STYLE)`` of `fedcodec.sim.page`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike


def curves(
    values: Mapping[str, ArrayLike],
    x: str,
    y: str,
    *,
    places: ArrayLike | None = None,
    logarithmic: str = "",
    columns: int = 2,
    title: str | None = None,
) -> Figure:
    """Draw a curve for each name, by default of what comes first, second and so on.

    Parameters
    ----------
    values : mapping of str to array_like
        The heights of each curve.
    x, y : str
        What the axes are.
    places : array_like, optional
        Of all curves on the first axis; 1, 2, 3 ... by default.
    logarithmic : {"", "x", "y", "xy"}
        Which axes are.
    columns : int
        Of the legend.
    title : str, optional
        Of the legend.
    """
    drawing = Figure()
    axes = drawing.add_subplot()
    for name, heights in values.items():
        axes.plot(
            np.arange(1, np.size(heights) + 1) if places is None else places, heights, label=name
        )
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if "x" in logarithmic:
        axes.set_xscale("log")
    elif places is None:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if "y" in logarithmic:
        axes.set_yscale("log")
    if len(values) > 1 or title:
        drawing.legend(loc="outside lower center", ncols=columns, title=title)
    return drawing
