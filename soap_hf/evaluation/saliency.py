"""Saliency without training: TokenCut on raw and on clean patch tokens, against masks drawn by people."""

from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from transformers.utils import logging

from ..data.loading import Example
from ..processes import on_main
from ..runtime.errors import DataError
from .bilateral_solver import BilateralGrid, largest_region
from .comparison import Comparison
from .examples import Examples, short_names
from .masks import USUAL, Mask, few_levels, levels_of_all, read_mask
from .methods import layer_statistics
from .results import Results
from .saliency_metrics import accuracy, e_measure, f_measures, iou, s_measure
from .salient_object import (
    MAX_PATCHES,
    coarse_mask,
    in_whole_patches,
    is_shrunk,
    nothing_to_cut,
    patch_stride,
    raw_grid,
    resized,
)

logger = logging.get_logger(__name__)

METRICS = (
    *("iou", "iou_bilateral", "iou_bilateral_largest", "max_f", "max_f_bilateral", "accuracy", "accuracy_bilateral"),
    *("s_measure", "s_measure_bilateral", "e_measure", "e_measure_bilateral"),
)
"""In the order of their columns."""


REASONS = {
    "empty_masks": "have an empty mask, and are left out",
    "shrunk_images": f"have more than {MAX_PATCHES} patches and were shrunk for the backbone",
}
"""What may surprise of an image, by the summary's counts of it; anything else is that nothing was divided."""


class Pair(NamedTuple):
    """An image `(H, W, 3)` uint8, the same for the backbone `(3, h, w)` uint8, and its object."""

    image: np.ndarray
    rgb: Tensor
    shrunk: bool
    mask: Mask

    @property
    def truth(self) -> np.ndarray:
        """The object, `(H, W)` bool."""
        return self.mask.object


def evaluate_saliency(
    comparison: Comparison,
    examples: Examples,
    *,
    bilateral: bool = True,
    image_size: tuple[int, int] | None = None,
    centred: bool = False,
    progress: bool = True,
    command: str | None = None,
) -> Results:
    """Finds the salient object of each image by TokenCut, on the raw and the clean tokens of one forward pass.

    All methods have one rule for the seed (`token_cut`), one for up-sampling (nearest), and one bilateral grid per
    image. The backbone sees an image in its own size, to the nearest whole patch (Lanczos), with the image
    processor's mean and std but without its crop; one of more than 4,096 patches is shrunk to about that many. Where
    there is nothing to divide, as on an image of one colour, the mask is empty. Both are counted. An image in whose
    mask there is no object is left out, and counted too.

    Args:
        comparison ([`Comparison`]): the head and its methods.
        examples ([`Examples`]): images with masks, as `read_mask` reads them.
        bilateral (`bool`, defaults to `True`): measure after refinement by the fast bilateral solver, too.
        image_size (`(height, width)`, *optional*): resize all images to that, for a backbone that takes no other.
        centred (`bool`, defaults to `False`): take the fit's mean token from the raw tokens first, before any method,
            for a backbone whose tokens have one direction in common that links every patch to every other.
        progress (`bool`, defaults to `True`): show a bar.
        command (`str`, *optional*): noted in the summary.

    Returns:
        [`Results`]: one row per image. `<method>_iou`, `_accuracy`, `_max_f`, `_s_measure` and `_e_measure` are those
        of the mask. With `_bilateral` behind, they are those of the solver's output, whose mask is what exceeds 0.5;
        `_iou_bilateral_largest` is of the largest region of that, its holes filled. `max_f` of an image is its
        F-measure at the threshold that is best for the mean over all images, so that its mean is the usual maximal F.

    Raises:
        DataError: an example has no mask, or every mask is empty or full.
        HeadError: `centred`, but the head was saved without statistics.
        BackboneError: the backbone cannot take the size of an image.
        NonFiniteTokensError: a token holds NaN or Inf.
    """
    offset = layer_statistics(comparison.model, comparison.layer).mean if centred else None
    levels = _levels(examples, comparison.share)
    prepare = partial(_pair, stride=patch_stride(comparison), image_size=image_size, levels=levels)

    def measure(pairs: list[Pair]) -> tuple[dict[str, float | np.ndarray] | None, list[str], str]:
        """What was measured of the image, unless its mask is empty; what may surprise of it; how its mask was read."""
        (pair,) = pairs
        if not pair.truth.any():
            return None, ["empty_masks"], pair.mask.reading
        notes = ["shrunk_images"] * pair.shrunk
        return _measure(comparison, pair, bilateral, offset, notes), notes, pair.mask.reading

    parts = examples.measured(prepare, measure, share=comparison.share, progress=progress)
    measured, noted, read_from = zip(*(part.value for part in parts), strict=True)
    readings = Counter(one for own, one in zip(measured, read_from, strict=True) if own is not None)
    names = short_names([name for part in parts for name in part.names])
    counts = {"images": len(names) - noted.count(["empty_masks"]), "bad_images": len(examples.bad_images)}
    for kind in ("empty_masks", "shrunk_images", *(f"undivided_{method}" for method in comparison.methods)):
        which = [name for name, own in zip(names, noted, strict=True) if kind in own]
        counts[kind] = len(which)
        if which:
            some = ", ".join(which[:5]) + (" …" if len(which) > 5 else "")
            told = f"{len(which)} images {REASONS.get(kind)}: {some}."
            if kind not in REASONS:
                method = kind.removeprefix("undivided_")
                what = f"In {len(which)} images no object is found by {method} tokens ({some})"
                told = f"{what}: of such an image {nothing_to_cut(centred)}."
            on_main(logger.warning, told)
    if readings.keys() - USUAL:
        told = ", ".join(f"{reading} ({count})" for reading, count in readings.most_common())
        on_main(logger.warning, f"The object in the masks was read from {told}.")
    whole = [own for own in measured if own is not None]
    rows: list[dict[str, Any]] = [
        {"image": name} for name, own in zip(names, measured, strict=True) if own is not None
    ]
    for column in (f"{method}_{metric}" for metric in METRICS for method in comparison.methods):
        if column in whole[0]:
            values = np.array([own[column] for own in whole])
            if values.ndim == 2:  # curves: their values at the threshold which is best for their mean
                values = values[:, values.mean(axis=0).argmax()]
            for row, value in zip(rows, values.tolist(), strict=True):
                row[column] = value
    size = "own" if image_size is None else list(image_size)
    settings = {"image_size": size, "bilateral": bilateral, "centred": centred, "masks": dict(readings)}
    return comparison.results("saliency", rows, METRICS, counts=counts, command=command, **settings)


class Glance(NamedTuple):
    """What a mask is by itself: its levels, whether there is an object and a background, and why that is unknown."""

    levels: tuple[float, ...] | None
    shows_object: bool
    refusal: str | None = None


def _glance(example: Example) -> Glance:
    if example.mask is None:
        raise DataError(f"{example.name} has no mask; give a folder of masks, or name the mask column.")
    levels = few_levels(example.mask)
    try:
        found = read_mask(example.mask).object
    except DataError as error:
        return Glance(levels, True, f"The mask of {example.name} cannot be read: {error}")
    return Glance(levels, bool(found.any() and not found.all()))


def _levels(examples: Examples, share: bool) -> tuple[float, ...]:
    """The levels of all masks, if they are few; a `DataError` if there is no object to find, or no telling which."""
    glances = [glance for part in examples.measured(_glance, list, share=share) for glance in part.value]
    if not any(glance.shows_object for glance in glances):
        raise DataError("Every mask is empty or full, so that there is no object to find; check the masks.")
    levels = levels_of_all(glance.levels for glance in glances)
    refusal = next((glance.refusal for glance in glances if glance.refusal), None)
    if refusal and 0 not in levels:
        raise DataError(refusal)
    return levels


def _pair(example: Example, stride: int, image_size: tuple[int, int] | None, levels: tuple[float, ...]) -> Pair:
    """Runs in the processes that decode."""
    own_size = example.image.height, example.image.width
    rgb = resized(example.image, image_size or in_whole_patches(own_size, stride))
    shrunk = image_size is None and is_shrunk(own_size, stride)
    assert example.mask is not None  # `_glance` has seen it
    return Pair(np.array(example.image), rgb, shrunk, read_mask(example.mask, levels))


def _measure(
    comparison: Comparison, pair: Pair, bilateral: bool, offset: Tensor | None, noted: list[str]
) -> dict[str, float | np.ndarray]:
    """Every `<method>_<metric>` of one image, of `max_f` one value per threshold; notes what was not divided."""
    found: dict[str, float | np.ndarray] = {}
    raw = raw_grid(comparison, pair.rgb)
    if offset is not None:
        raw = raw - offset.to(raw)
    grid = BilateralGrid(pair.image) if bilateral else None
    for method, projection in comparison.methods.items():
        mask = coarse_mask(projection(raw), pair.truth.shape)
        if mask is None:
            noted.append(f"undivided_{method}")
            mask = np.zeros(pair.truth.shape, bool)
        maps = {"": (mask, mask.astype(np.float64))}
        if grid is not None:
            refined = grid.refine(mask).clip(0, 1)
            maps["_bilateral"] = refined > 0.5, refined
            found[f"{method}_iou_bilateral_largest"] = iou(largest_region(refined > 0.5), pair.truth)
        for suffix, (own, saliency) in maps.items():
            found |= {
                f"{method}_iou{suffix}": iou(own, pair.truth),
                f"{method}_max_f{suffix}": f_measures(saliency, pair.truth),
                f"{method}_accuracy{suffix}": accuracy(own, pair.truth),
                f"{method}_s_measure{suffix}": s_measure(saliency, pair.truth),
                f"{method}_e_measure{suffix}": e_measure(own, pair.truth),
            }
    return found
