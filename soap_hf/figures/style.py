"""The look of every figure: one style, colours for every eye, and files that come out the same."""

import os
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from matplotlib import colormaps, style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import replacing

DPI = 200

QUALITATIVE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours (https://jfly.uni-koeln.de/color/) without yellow, which is lost on white."""

MARKERS = "os^DvPX"

SHARES = "managua"
"""Colour map of shares: light at both ends, where all images respond alike, and dark at the coin flip."""

ORDERED = "viridis"
"""Colour map of values from low to high: dark to light."""

MARK = "#D55E00"
"""What marks a patch: Okabe and Ito's vermilion, which `ORDERED` does not hold."""

SIGNED = "PuOr_r"
"""Colour map of signed values: white at 0, so that it can lie over an image."""

styled = style.context(
    [
        "default",  # whatever the user's matplotlibrc says
        {
            "axes.linewidth": 0.6,
            "axes.titlesize": 7.5,
            "figure.constrained_layout.h_pad": 0.05,
            "figure.constrained_layout.w_pad": 0.05,
            "font.size": 7.5,
            "legend.frameon": False,
            "lines.linewidth": 1.2,
            "lines.markersize": 4,
            "text.parse_math": False,  # a model's name may hold a dollar
            "xtick.major.width": 0.6,
            "ytick.major.width": 0.6,
        },
    ]
)
"""Decorates what draws or renders."""


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """An empty figure of that many inches, unknown to `pyplot`."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


def series_looks(count: int) -> list[dict[str, Any]]:
    """Colour and marker of each of `count` curves; for many, the colours go from dark to light."""
    colours: Sequence[Any] = QUALITATIVE
    if count > len(QUALITATIVE):
        colours = [colormaps["viridis"](0.9 * number / (count - 1)) for number in range(count)]
    return [{"color": colours[number], "marker": MARKERS[number % len(MARKERS)]} for number in range(count)]


@styled
def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file; the same bytes for the same figure."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a PNG file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(to_png(figure))
