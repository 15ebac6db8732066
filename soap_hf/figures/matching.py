"""Matching between views, in pictures: which patches find each other."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch
from PIL import Image
from torch import Tensor

from ..data.preprocessing import to_rgb
from ..evaluation.arguments import ViewRule
from ..evaluation.comparison import Comparison
from ..evaluation.matching import nearest, tokens_of
from ..evaluation.views import ViewPair, draw_views, patch_centres, true_places
from ..heads.model import SOAPModelWrapper
from ..runtime.errors import DataError
from .panels import coloured, enlarged
from .placing import GAP, LINE, MARGIN, picture_grid, place_axes, place_text, show
from .style import QUALITATIVE, new_figure, styled

SHOWN_MATCHES = 20
"""Lines in a pair of views; more could not be followed."""

VIEW_SIDE, LEGEND_HEIGHT = 1.6, 0.25
"""Inches."""

BLOCKS = 2
"""Photographs side by side."""

RIGHT = {"color": QUALITATIVE[0], "linestyle": "-", "marker": "o"}
WRONG = {"color": QUALITATIVE[1], "linestyle": ":", "marker": "x"}


@styled
def matching_views(
    model: SOAPModelWrapper,
    images: Sequence[Image.Image],
    *,
    layer: int | None = None,
    rule: ViewRule | None = None,
    seed: int = 0,
) -> Figure:
    """Two views of each photograph and lines from patches to their matches, by raw tokens above and by clean below.

    Right matches, within one patch of the truth, have solid lines that end in a disc, wrong ones dotted lines that end
    in a cross. Of the patches that both views show, up to 20 are drawn; the shares are of all.

    Args:
        model ([`SOAPModelWrapper`]): a head and its backbone.
        images (sequence of `PIL.Image.Image`): photographs, any mode.
        layer (`int`, *optional*): one of the head's layers; default: the last one.
        rule ([`ViewRule`], *optional*), seed (`int`, defaults to 0): of the views.

    Raises:
        DataError: no image, or one that gives no two views.
    """
    comparison = Comparison.of(model, layer=layer)
    if not images:
        raise DataError("A figure of images needs at least one.")
    grid = comparison.grid
    height, width = comparison.preprocess.size
    view, across = VIEW_SIDE * height / width, min(len(images), BLOCKS)
    block, row = 2 * (VIEW_SIDE + GAP) + 2 * MARGIN, view + LINE + 0.06 + GAP
    tall = 2 * row + MARGIN
    figure = new_figure(across * block, math.ceil(len(images) / across) * tall + MARGIN + LEGEND_HEIGHT)
    for number, (pair, patches) in enumerate(_views(comparison, images, rule, seed)):
        left, top = MARGIN + number % across * block, MARGIN + number // across * tall
        for name, clean in comparison.methods.items():
            lefts = (left, left + VIEW_SIDE + GAP)
            panels = [place_axes(figure, one, top + LINE + 0.06, VIEW_SIDE, view) for one in lefts]
            share = _draw_matches(panels, pair, clean(patches), grid)
            place_text(figure, left, top, f"{'raw' if name == 'raw' else 'clean'} tokens: {share:.0%} right")
            top += row
    marks: dict[str, dict[str, Any]] = {"right, within one patch": RIGHT, "wrong": WRONG}
    handles = [Line2D([], [], label=label, markersize=3, linewidth=0.7, **look) for label, look in marks.items()]
    figure.legend(handles=handles, loc="lower center", ncols=2)
    return figure


@styled
def match_fields(
    model: SOAPModelWrapper,
    images: Sequence[Image.Image],
    *,
    layer: int | None = None,
    rule: ViewRule | None = None,
    seed: int = 0,
) -> Figure:
    """Two views of each photograph, one row each, and where every patch of the second is found in the first.

    Places of the first view have colours. Each patch of the second takes the colour of the place where it truly lies
    in the first (white if nowhere), then that of its best match by raw and by clean tokens, with the share of those
    that lie within one patch of the truth. The views are those of [`matching_views`].

    Args:
        model ([`SOAPModelWrapper`]): a head and its backbone.
        images (sequence of `PIL.Image.Image`): photographs, any mode.
        layer (`int`, *optional*): one of the head's layers; default: the last one.
        rule ([`ViewRule`], *optional*), seed (`int`, defaults to 0): of the views.

    Raises:
        DataError: no image, or one that gives no two views.
    """
    comparison = Comparison.of(model, layer=layer)
    colours = place_colours(comparison.grid)
    flat, rows = colours.flatten(0, 1), []
    for pair, patches in _views(comparison, images, rule, seed):
        first, second = (Image.fromarray(view.permute(1, 2, 0).numpy()) for view in pair.views)
        places, inside = true_places(torch.linalg.inv(pair.homography), comparison.grid)
        row, column = places.floor().long().clamp(torch.zeros(2), torch.tensor(comparison.grid) - 1).long().T
        chosen = [nearest(clean(patches)[1], clean(patches)[0]).cpu() for clean in comparison.methods.values()]
        misses = [(patch_centres(comparison.grid)[match] - places)[inside].abs().amax(dim=1) for match in chosen]
        fields = [colours[row, column], *(flat[match] for match in chosen)]
        shown = [coloured(second, torch.where(inside[:, None], one, 1.0).view_as(colours)) for one in fields]
        shares = [f"{float((miss <= 1).double().mean()):.0%} right" for miss in misses]
        pictures = [enlarged(first), coloured(first, colours), enlarged(second), *shown]
        rows.append((pictures, ["", "", "", "", *shares]))
    if not rows:
        raise DataError("A figure of images needs at least one.")
    titles = ["first view", "its places", "second view", "truth", "raw matches", "clean matches"]
    figure, panels = picture_grid([pictures[0] for pictures, _ in rows], titles)
    for row_of_pictures, line in zip(rows, panels, strict=True):
        for picture, words, axes in zip(*row_of_pictures, line, strict=True):
            show(axes, picture)
            if words:
                axes.text(0.04, 0.05, words, bbox={"facecolor": "white", "linewidth": 0, "pad": 1.5})
    return figure


def place_colours(grid: tuple[int, int]) -> Tensor:
    """A colour for each place of a grid, `(rows, columns, 3)` in [0, 1], which changes smoothly and never repeats."""
    down, across = (patch_centres(grid) / torch.tensor(grid)).T
    return torch.stack([across, 1 - down, 0.5 + 0.5 * (down - across)], dim=1).view(*grid, 3)


def _views(
    comparison: Comparison, images: Sequence[Image.Image], rule: ViewRule | None, seed: int
) -> Iterator[tuple[ViewPair, Tensor]]:
    """Two views of each photograph and their raw patch tokens, `(2, rows · columns, D)`."""
    for number, image in enumerate(images):
        generator = np.random.default_rng([seed, number])
        pair = draw_views(to_rgb(image), rule or ViewRule(), comparison.preprocess.size, comparison.grid, generator)
        if isinstance(pair, str):
            raise DataError(f"Image {number + 1}: {pair}.")
        yield pair, tokens_of(comparison, pair.views)[comparison.layer]


def _draw_matches(panels: Sequence[Axes], pair: ViewPair, patches: Tensor, grid: tuple[int, int]) -> float:
    """Draws both views and their matches; the share that is right."""
    for axes, view in zip(panels, pair.views, strict=True):
        show(axes, view.permute(1, 2, 0).numpy())
        axes.set(xlim=(0, 1), ylim=(0, 1))
    places, inside = true_places(pair.homography, grid)
    centres, own = patch_centres(grid), inside.nonzero().squeeze(1)
    chosen = nearest(patches[0][inside.to(patches.device)], patches[1]).cpu()
    right = (centres[chosen] - places[inside]).abs().amax(dim=1) <= 1
    shares = centres / torch.tensor(grid)
    for number in np.linspace(0, len(own) - 1, min(SHOWN_MATCHES, len(own))).round().astype(int):
        look = RIGHT if right[number] else WRONG
        ends = [(float(x), 1 - float(y)) for y, x in (shares[own[number]], shares[chosen[number]])]
        line: dict[str, Any] = {"color": look["color"], "linestyle": look["linestyle"], "linewidth": 0.7}
        panels[1].add_artist(ConnectionPatch(ends[0], ends[1], "data", axesA=panels[0], axesB=panels[1], **line))
        panels[0].plot(*ends[0], color=look["color"], marker=".", markersize=3)
        panels[1].plot(*ends[1], color=look["color"], marker=look["marker"], markersize=3)
    return float(right.double().mean())
