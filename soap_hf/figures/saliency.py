"""Salient objects, found by TokenCut in the raw and in the clean tokens of an image."""

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
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
    shown, masks = [], []
    for image in images:
        image = to_rgb(image)
        masks.append(_masks(comparison, image, image_size))
        shown.append(displayed(image))
    if not shown:
        raise DataError("A figure of images needs at least one.")
    figure, rows = picture_grid(shown, ["image", "object in raw tokens", "object in clean tokens"])
    for image, methods, (first, *others) in zip(shown, masks, rows, strict=True):
        show(first, image)
        for axes, mask in zip(others, methods.values(), strict=True):
            _show_object(axes, np.asarray(image), mask)
    return figure


def _masks(comparison: Comparison, image: Image.Image, image_size: tuple[int, int] | None) -> dict[str, np.ndarray]:
    """The object `(H, W)` of each method, bool; empty where there is nothing to divide."""
    own_size = image.height, image.width
    raw = raw_grid(comparison, resized(image, image_size or in_whole_patches(own_size, patch_stride(comparison))))
    grid = BilateralGrid(np.array(image))
    coarse = {name: coarse_mask(projection(raw), own_size) for name, projection in comparison.methods.items()}
    return {
        name: np.zeros(own_size, bool) if mask is None else grid.refine(mask) > 0.5 for name, mask in coarse.items()
    }


def _show_object(axes: Axes, image: np.ndarray, mask: np.ndarray) -> None:
    mask = np.asarray(Image.fromarray(mask).resize(image.shape[1::-1], Image.Resampling.NEAREST))
    faded = image + FADING * (255.0 - image)
    show(axes, np.where(mask[..., None], image, faded).astype(np.uint8))
    if mask.all() or not mask.any():
        share = "all" if mask.all() else "none"
        axes.text(0.5, 0.5, share, ha="center", va="center", bbox={"facecolor": "white", "linewidth": 0})
