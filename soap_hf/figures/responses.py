"""Response maps: where the leading components respond positively; and the figures that are saved beside a head."""

import math

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from .placing import COLORBAR_HEIGHT, LINE, MARGIN, PAGE_WIDTH, place_axes, place_colorbar, place_text
from .records import FittedHead, backbone_label, scored_layers, stored_components
from .scores import score_curve
from .style import SHARES, new_figure, styled, to_png

PAIRS_A_ROW = 5
PAIRS_OF_ONE_LAYER = 10

GAP, WIDE_GAP = 0.04, 0.16
"""Inches between the maps of a pair, and between pairs."""

MAP_WIDTH = ((PAGE_WIDTH - 2 * MARGIN + WIDE_GAP) / PAIRS_A_ROW - WIDE_GAP - GAP) / 2
LOWEST, HIGHEST = 0.1, 2.0
"""Height of a map, as a multiple of its width."""


def head_figures(head: FittedHead) -> dict[str, bytes]:
    """PNG files by name, for `save_pretrained(…, figures=…)`: score curve and response maps.

    Args:
        head ([`SOAPModelWrapper`] or [`HeadRecord`]): a head with statistics.

    Raises:
        HeadError: the head was saved without statistics, or made without a fit.
    """
    return {
        "score_curve.png": to_png(score_curve({backbone_label(head.config): head})),
        "response_maps.png": to_png(response_maps(head)),
    }


@styled
def response_maps(head: FittedHead) -> Figure:
    """Shares of images with a positive response, real (P) beside synthetic (Q), of the highest-scoring components.

    Ten components of a head of one layer, five of each layer of a head of several. The frames of a clip are laid out
    in reading order.

    Args:
        head ([`SOAPModelWrapper`] or [`HeadRecord`]): a head with statistics.

    Raises:
        HeadError: the head was saved without statistics, or made without a fit.
    """
    layers = scored_layers(head)
    shown = PAIRS_OF_ONE_LAYER if len(layers) == 1 else PAIRS_A_ROW
    rows = []
    for layer in layers:
        components = stored_components(layer, shown)
        starts = range(0, len(components), PAIRS_A_ROW)
        rows += [(layer.name, components[start : start + PAIRS_A_ROW]) for start in starts]
    named = LINE * (len(layers) > 1)
    header = named + 3 * LINE + 0.04
    shapes = [mosaic(components[0].real_response).shape for _, components in rows]
    heights = [MAP_WIDTH * min(max(down / across, LOWEST), HIGHEST) for down, across in shapes]
    figure = new_figure(PAGE_WIDTH, MARGIN + sum(heights) + len(rows) * (header + WIDE_GAP) + COLORBAR_HEIGHT)
    top = MARGIN
    for (name, components), height in zip(rows, heights, strict=True):
        if named:
            place_text(figure, MARGIN, top, name, weight="bold")
        for number, component in enumerate(components):
            left = MARGIN + number * (2 * MAP_WIDTH + GAP + WIDE_GAP)
            place_text(figure, left, top + named, component.caption)
            for title, response in (("real", component.real_response), ("synthetic", component.synthetic_response)):
                axes = place_axes(figure, left, top + header, MAP_WIDTH, height)
                axes.imshow(mosaic(response), cmap=SHARES, vmin=0, vmax=1, interpolation="nearest")
                axes.set_title(title, pad=2, color="0.4")
                left += MAP_WIDTH + GAP
        top += header + height + WIDE_GAP
    place_colorbar(figure, share_scale(), "share of images with a positive response")
    return figure


def share_scale() -> ScalarMappable:
    """The colours of shares."""
    return ScalarMappable(Normalize(0, 1), SHARES)


def mosaic(response: Tensor) -> np.ndarray:
    """A map of `(rows, columns)` as it is; one of `(frames, rows, columns)` frame after frame, with gaps of NaN."""
    if response.ndim == 2:
        return response.numpy()
    frames, rows, columns = response.shape
    across = math.ceil(math.sqrt(frames))
    down = math.ceil(frames / across)
    mosaic = np.full((down * (rows + 1) - 1, across * (columns + 1) - 1), np.nan)
    for number, frame in enumerate(response.numpy()):
        row, column = number // across * (rows + 1), number % across * (columns + 1)
        mosaic[row : row + rows, column : column + columns] = frame
    return mosaic
