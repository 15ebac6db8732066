"""Salient objects, found by TokenCut in the raw and in the clean tokens of an image."""

from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from ..data.preprocessing import to_rgb
from ..evaluation.bilateral_solver import BilateralGrid
from ..evaluation.comparison import Comparison
from ..evaluation.methods import layer_statistics
from ..evaluation.salient_object import (
    coarse_mask,
    in_whole_patches,
    nothing_to_cut,
    patch_stride,
    raw_grid,
    resized,
)
from ..heads.model import SOAPModelWrapper
from ..runtime.errors import DataError
from .panels import faded
from .pictures import displayed
from .placing import picture_grid, show
from .style import styled

logger = logging.get_logger(__name__)


def found_object(tokens: Tensor, grid: BilateralGrid, size: tuple[int, int]) -> np.ndarray:
    """The salient object in patch tokens `(rows, columns, D)`: TokenCut, refined on the bilateral grid of an image.

    `(height, width)` bool of the image's size; nowhere if there is nothing to divide.
    """
    coarse = coarse_mask(tokens, size)
    return np.zeros(size, bool) if coarse is None else grid.refine(coarse) > 0.5


SAID = {"all": "all of it", "none": "no object"}
"""What a panel says that shows nothing else."""


def all_or_none(mask: np.ndarray) -> str | None:
    """What to say of an object that is the whole image or nothing, since that cannot be seen."""
    return "all" if mask.all() else None if mask.any() else "none"


@styled
def saliency_masks(
    model: SOAPModelWrapper,
    images: Iterable[Image.Image],
    *,
    layer: int | None = None,
    image_size: tuple[int, int] | None = None,
    centred: bool = False,
) -> Figure:
    """Images, one per row, with all faded but the salient object, as raw and as clean tokens have it.

    TokenCut and the bilateral solver, as in [`~soap_hf.evaluation.saliency.evaluate_saliency`].

    Args:
        model ([`SOAPModelWrapper`]): a head and its backbone.
        images (iterable of `PIL.Image.Image`): any mode and size.
        layer (`int`, *optional*): one of the head's layers; default: the last one.
        image_size (`(height, width)`, *optional*): resize all images to that, for a backbone that takes no other. By
            default they keep their own size, to the nearest whole patch.
        centred (`bool`, defaults to `False`): take the fit's mean token from the raw tokens first, for a backbone
            whose tokens have one direction in common, so that TokenCut finds no object in them.

    Raises:
        HeadError: the head has no such layer, or `centred` and it was saved without statistics.
        BackboneError: the backbone cannot take images of that size.
        DataError: no image.
    """
    comparison = Comparison.of(model, layer=layer)
    offset = layer_statistics(model, comparison.layer).mean if centred else None
    shown, objects = [], []
    for image in map(to_rgb, images):
        own_size = image.height, image.width
        raw = raw_grid(comparison, resized(image, image_size or in_whole_patches(own_size, patch_stride(comparison))))
        raw = raw if offset is None else raw - offset.to(raw)
        grid = BilateralGrid(np.array(image))
        objects.append([found_object(clean(raw), grid, own_size) for clean in comparison.methods.values()])
        shown.append(displayed(image))
    if not shown:
        raise DataError("A figure of images needs at least one.")
    figure, rows = picture_grid(shown, ["image", "object in raw tokens", "object in clean tokens"])
    for number, method in enumerate(comparison.methods):
        empty = [str(place) for place, masks in enumerate(objects, 1) if not masks[number].any()]
        if empty:
            tokens = "raw" if method == "raw" else "clean"
            logger.warning(
                f"In {tokens} tokens there is no object in image {', '.join(empty)}: {nothing_to_cut(centred)}."
            )
    for image, masks, (first, *others) in zip(shown, objects, rows, strict=True):
        show(first, image)
        for axes, mask in zip(others, masks, strict=True):
            show(axes, faded(image, mask))
            if share := all_or_none(mask):
                axes.text(0.5, 0.5, SAID[share], ha="center", va="center", bbox={"facecolor": "white", "linewidth": 0})
    return figure
