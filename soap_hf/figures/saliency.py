"""Salient objects, found by TokenCut in the raw and in the clean tokens of an image."""

from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ..data.preprocessing import to_rgb
from ..evaluation.bilateral_solver import BilateralGrid
from ..evaluation.comparison import Comparison
from ..evaluation.salient_object import coarse_mask, in_whole_patches, patch_stride, raw_grid, resized
from ..heads.model import SOAPModelWrapper
from ..runtime.errors import DataError
from .panels import faded
from .pictures import displayed
from .placing import picture_grid, show
from .style import styled


def found_object(tokens: Tensor, grid: BilateralGrid, size: tuple[int, int]) -> np.ndarray:
    """The salient object in patch tokens `(rows, columns, D)`: TokenCut, refined on the bilateral grid of an image.

    `(height, width)` bool of the image's size; nowhere if there is nothing to divide.
    """
    coarse = coarse_mask(tokens, size)
    return np.zeros(size, bool) if coarse is None else grid.refine(coarse) > 0.5


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
) -> Figure:
    """Images, one per row, with all faded but the salient object, as raw and as clean tokens have it.

    TokenCut and the bilateral solver, as in [`~soap_hf.evaluation.saliency.evaluate_saliency`].

    Args:
        model ([`SOAPModelWrapper`]): a head and its backbone.
        images (iterable of `PIL.Image.Image`): any mode and size.
        layer (`int`, *optional*): one of the head's layers; default: the last one.
        image_size (`(height, width)`, *optional*): resize all images to that, for a backbone that takes no other. By
            default they keep their own size, to the nearest whole patch.

    Raises:
        HeadError: the head has no such layer.
        BackboneError: the backbone cannot take images of that size.
        DataError: no image.
    """
    comparison = Comparison.of(model, layer=layer)
    shown, objects = [], []
    for image in map(to_rgb, images):
        own_size = image.height, image.width
        raw = raw_grid(comparison, resized(image, image_size or in_whole_patches(own_size, patch_stride(comparison))))
        grid = BilateralGrid(np.array(image))
        objects.append([found_object(clean(raw), grid, own_size) for clean in comparison.methods.values()])
        shown.append(displayed(image))
    if not shown:
        raise DataError("A figure of images needs at least one.")
    figure, rows = picture_grid(shown, ["image", "object in raw tokens", "object in clean tokens"])
    for image, masks, (first, *others) in zip(shown, objects, rows, strict=True):
        show(first, image)
        for axes, mask in zip(others, masks, strict=True):
            show(axes, faded(image, mask))
            if share := all_or_none(mask):
                axes.text(0.5, 0.5, share, ha="center", va="center", bbox={"facecolor": "white", "linewidth": 0})
    return figure
