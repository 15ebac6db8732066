"""Salient objects, found by TokenCut in the raw and in the clean tokens of an image."""

from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ..data.preprocessing import to_rgb
from ..evaluation.bilateral_solver import BilateralGrid
from ..evaluation.comparison import Comparison
from ..evaluation.salient_object import coarse_mask, in_whole_patches, patch_stride, raw_grid, resized
from ..heads.model import SOAPModelWrapper
from ..runtime.errors import DataError
from .pictures import displayed
from .placing import picture_grid, show
from .style import styled

FADING = 0.75
"""How near to white everything is that does not belong to the object."""


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
        coarse = [coarse_mask(projection(raw), own_size) for projection in comparison.methods.values()]
        nothing = np.zeros(own_size, bool)  # to divide
        objects.append([nothing if mask is None else grid.refine(mask) > 0.5 for mask in coarse])
        shown.append(displayed(image))
    if not shown:
        raise DataError("A figure of images needs at least one.")
    figure, rows = picture_grid(shown, ["image", "object in raw tokens", "object in clean tokens"])
    for image, masks, (first, *others) in zip(shown, objects, rows, strict=True):
        show(first, image)
        for axes, mask in zip(others, masks, strict=True):
            smaller = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
            levels = np.asarray(image)
            faded = levels + FADING * (255.0 - levels)
            show(axes, np.where(smaller[..., None], levels, faded).astype(np.uint8))
            if smaller.all() or not smaller.any():
                share = "all" if smaller.all() else "none"
                axes.text(0.5, 0.5, share, ha="center", va="center", bbox={"facecolor": "white", "linewidth": 0})
    return figure
