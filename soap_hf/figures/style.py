"""The look of every figure: one style, colours for every eye, and files that come out the same."""

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import colormaps, style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import replacing
from ..runtime.errors import OutputError

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
            "pdf.fonttype": 42,  # whole letters, which journals ask for
            "svg.hashsalt": "soap-hf",  # ids that are the same in every run
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


FORMATS: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Creator": None, "Date": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}
"""Kinds of files, and the metadata of each that would differ from run to run."""


@styled
def rendered(figure: Figure, kind: str = "png") -> bytes:
    """The figure as a file; the same bytes for the same figure.

    Args:
        figure (`matplotlib.figure.Figure`): any.
        kind (`str`, defaults to `"png"`): `"png"`, `"svg"` or `"pdf"`. The last two scale without loss, but for
            photographs and maps, which are pixels in them too.

    Raises:
        OutputError: there is no such kind.
    """
    if kind not in FORMATS:
        raise OutputError(f"Figures are written as {', '.join(FORMATS)}, not as {kind!r}; choose one of these.")
    buffer = BytesIO()
    figure.savefig(buffer, format=kind, dpi=DPI, metadata=FORMATS[kind])
    return buffer.getvalue()


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file; the same bytes for the same figure."""
    return rendered(figure)


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a PNG, SVG or PDF file, as the ending of its name says, whole or not at all.

    Raises:
        OutputError: it cannot be written, or ends otherwise.
    """
    content = rendered(figure, Path(path).suffix.lower().lstrip("."))
    with replacing(path) as temporary:
        temporary.write_bytes(content)
