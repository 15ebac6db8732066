"""Where things stand in a figure: places in inches, legends that fit, rows of pictures."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from PIL import Image

from .style import new_figure

PAGE_WIDTH = 7.0
"""Inches: what spans both columns of a paper."""

MARGIN = 0.08
LINE = 0.13
"""Inches from one line of text to the next."""

COLORBAR_WIDTH, COLORBAR_HEIGHT = 2.2, 0.45
"""Inches, with numbers and label."""

GAP = 0.06
"""Inches between pictures."""

NARROWEST_COLUMN = 1.25
SIDE, WIDEST, TALLEST = 1.3, 1.3, 2.4
"""Inches of a square picture, and limits of others, which have its area."""

LONGEST_LABEL = 60


def place_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes without ticks; inches from the left and from the top of the figure."""
    whole_width, whole_height = figure.get_size_inches()
    box = (left / whole_width, 1 - (top + height) / whole_height, width / whole_width, height / whole_height)
    return figure.add_axes(box, xticks=[], yticks=[])


def place_text(figure: Figure, left: float, top: float, text: str, **options: Any) -> None:
    """A line of text; inches from the left and from the top of the figure."""
    width, height = figure.get_size_inches()
    figure.text(left / width, 1 - top / height, text, **{"va": "top", **options})


def place_colorbar(figure: Figure, shown: ScalarMappable, label: str, **options: Any) -> None:
    """A horizontal colour bar in the middle of the last `COLORBAR_HEIGHT` inches of the figure."""
    width, height = figure.get_size_inches()
    axes = place_axes(figure, (width - COLORBAR_WIDTH) / 2, height - COLORBAR_HEIGHT, COLORBAR_WIDTH, 0.08)
    figure.colorbar(shown, cax=axes, orientation="horizontal", label=label, **options)


def add_legend(figure: Figure, entries: Sequence[tuple[str, Artist]], title: str | None = None) -> None:
    """A legend below everything else, in as many columns as fit; the figure grows by its height."""
    labels, handles = [_short(label) for label, _ in entries], [handle for _, handle in entries]
    title = None if title is None else _short(title)
    for columns in range(len(entries), 0, -1):
        legend = figure.legend(handles, labels, title=title, loc="outside lower center", ncols=columns)
        size = legend.get_window_extent()
        if size.width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + size.height / figure.dpi)


def _short(label: str) -> str:
    """Printable, not too long, and without the leading underscore with which matplotlib would hide it."""
    text = "".join(character for character in label if character.isprintable())
    text = text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL // 2]}…{text[-LONGEST_LABEL // 2 + 1 :]}"
    return f" {text}" if text.startswith("_") else text


def picture_grid(
    images: Sequence[Image.Image], titles: Sequence[str], room: float = 0
) -> tuple[Figure, list[list[Axes]]]:
    """A row of axes for each image, titles above the first; `room` inches are left below the last."""
    sizes = []
    for image in images:  # of one area, but within limits
        shape = math.sqrt(image.width / image.height)
        scale = min(SIDE, WIDEST / shape, TALLEST * shape)
        sizes.append((scale * shape, scale / shape))
    column = max(NARROWEST_COLUMN, *(width for width, _ in sizes)) + GAP
    header = (1 + titles[0].count("\n")) * LINE + 0.03
    height = MARGIN + header + sum(height + GAP for _, height in sizes) + room
    figure = new_figure(2 * MARGIN + len(titles) * column - GAP, height)
    rows, top = [], MARGIN + header
    for width, height in sizes:
        lefts = [MARGIN + number * column + (column - GAP - width) / 2 for number in range(len(titles))]
        rows.append([place_axes(figure, left, top, width, height) for left in lefts])
        top += height + GAP
    for axes, title in zip(rows[0], titles, strict=True):
        axes.set_title(title, pad=2)
    return figure, rows


def show(axes: Axes, picture: Any, **options: Any) -> None:
    """An image, or values a patch each, over all of the axes."""
    axes.imshow(picture, extent=(0, 1, 0, 1), aspect="auto", **options)
