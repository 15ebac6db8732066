"""Saliency without training: TokenCut on raw and on clean patch tokens, against masks drawn by people."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from ..data.image_sample import Example
from ..runtime.errors import DataError
from .bilateral_solver import BilateralGrid, largest_region
from .comparison import Comparison
from .examples import Examples, short_names
from .methods import layer_statistics
from .results import Results
from .saliency_metrics import accuracy, e_measure, f_measures, iou, s_measure
from .salient_object import MAX_PATCHES, coarse_mask, in_whole_patches, is_shrunk, patch_stride, raw_grid, resized

logger = logging.get_logger(__name__)

METRICS = (
    *("iou", "iou_bilateral", "iou_bilateral_largest", "max_f", "max_f_bilateral", "accuracy", "accuracy_bilateral"),
    *("s_measure", "s_measure_bilateral", "e_measure", "e_measure_bilateral"),
)
"""In the order of their columns."""


class Pair(NamedTuple):
    """An image `(H, W, 3)` uint8, the same for the backbone `(3, h, w)` uint8, and its object `(H, W)` bool."""

    image: np.ndarray
    rgb: Tensor
    shrunk: bool
    truth: np.ndarray


class Measured(NamedTuple):
    """What the methods make of one image.

    Attributes:
        values (`dict[tuple[str, str], float | np.ndarray]`): by metric and method; of `max_f` one value per threshold.
        noted (`list[str]`): what may surprise, by the names of the summary's counts.
    """

    values: dict[tuple[str, str], float | np.ndarray]
    noted: list[str]


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
    there is nothing to divide, as on an image of one colour, the mask is empty. Both are counted.

    Args:
        comparison ([`Comparison`]): the head and its methods.
        examples ([`Examples`]): images with masks, as `object_in_mask` reads them.
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
        DataError: an example has no mask.
        HeadError: `centred`, but the head was saved without statistics.
        BackboneError: the backbone cannot take the size of an image.
        NonFiniteTokensError: a token holds NaN or Inf.
    """
    offset = layer_statistics(comparison.model, comparison.layer).mean if centred else None
    prepare = partial(_pair, stride=patch_stride(comparison), image_size=image_size)
    names, measured = [], []
    for batch in examples.batches(prepare, progress=progress):
        names += batch.names
        measured += [_measure(comparison, pair, bilateral, offset) for pair in batch.values]
    names = short_names(names)
    noted = {
        kind: [name for name, one in zip(names, measured, strict=True) if kind in one.noted]
        for kind in ("empty_masks", "shrunk_images", *(f"undivided_{method}" for method in comparison.methods))
    }
    _say(noted)
    rows = _rows(names, measured, comparison.methods)
    return comparison.results(
        "saliency",
        rows,
        METRICS,
        counts={
            "images": len(rows),
            "bad_images": len(examples.bad_images),
            **{kind: len(which) for kind, which in noted.items()},
        },
        command=command,
        image_size="own" if image_size is None else list(image_size),
        bilateral=bilateral,
        centred=centred,
    )


def object_in_mask(mask: Image.Image) -> np.ndarray:
    """The object in a mask file, `(H, W)` bool: levels above 127; in a mask without a level above 1, those of 1.

    Example:
        >>> object_in_mask(Image.new("L", (2, 1), 255))
        array([[ True,  True]])
    """
    levels = np.array(mask if mask.mode.startswith("I") else mask.convert("L"))
    return levels > (127 if levels.max() > 1 else 0)


def _pair(example: Example, stride: int, image_size: tuple[int, int] | None) -> Pair:
    """Runs in the processes that decode."""
    if example.mask is None:
        raise DataError(f"{example.name} has no mask; give a folder of masks, or name the mask column.")
    own_size = example.image.height, example.image.width
    rgb = resized(example.image, image_size or in_whole_patches(own_size, stride))
    shrunk = image_size is None and is_shrunk(own_size, stride)
    return Pair(np.array(example.image), rgb, shrunk, object_in_mask(example.mask))


def _measure(comparison: Comparison, pair: Pair, bilateral: bool, offset: Tensor | None) -> Measured:
    values: dict[tuple[str, str], float | np.ndarray] = {}
    noted = ["empty_masks"] * (not pair.truth.any()) + ["shrunk_images"] * pair.shrunk
    raw = raw_grid(comparison, pair.rgb)
    if offset is not None:
        raw = raw - offset.to(raw)
    grid = BilateralGrid(pair.image) if bilateral else None
    for method, projection in comparison.methods.items():
        mask = coarse_mask(projection(raw), pair.truth.shape)
        if mask is None:
            noted.append(f"undivided_{method}")
            mask = np.zeros(pair.truth.shape, bool)
        found = _measures(mask, mask.astype(np.float64), pair.truth)
        if grid is not None:
            refined = grid.refine(mask).clip(0, 1)
            after = _measures(refined > 0.5, refined, pair.truth)
            found |= {f"{metric}_bilateral": value for metric, value in after.items()}
            found["iou_bilateral_largest"] = iou(largest_region(refined > 0.5), pair.truth)
        values |= {(metric, method): value for metric, value in found.items()}
    return Measured(values, noted)


def _measures(mask: np.ndarray, saliency: np.ndarray, truth: np.ndarray) -> dict[str, float | np.ndarray]:
    return {
        "iou": iou(mask, truth),
        "max_f": f_measures(saliency, truth),
        "accuracy": accuracy(mask, truth),
        "s_measure": s_measure(saliency, truth),
        "e_measure": e_measure(mask, truth),
    }


def _rows(names: Sequence[str], measured: Sequence[Measured], methods: Iterable[str]) -> list[dict[str, Any]]:
    """One row per image, with the methods side by side."""
    columns = {
        f"{method}_{metric}": _column([one.values[metric, method] for one in measured])
        for metric in METRICS
        for method in methods
        if (metric, method) in measured[0].values
    }
    return [
        {"image": name, **{column: values[number] for column, values in columns.items()}}
        for number, name in enumerate(names)
    ]


def _column(values: Sequence[float | np.ndarray]) -> list[float]:
    """One value per image; of curves that at the threshold which is best for their mean."""
    stacked = np.array(values)
    if stacked.ndim == 2:
        stacked = stacked[:, stacked.mean(axis=0).argmax()]
    return stacked.tolist()


def _say(noted: dict[str, list[str]]) -> None:
    """Warns of images that were treated in a way that may surprise; names the first."""
    reasons = {
        "empty_masks": "have an empty mask (no level above 127)",
        "shrunk_images": f"have more than {MAX_PATCHES} patches and were shrunk for the backbone",
    }
    for kind, which in noted.items():
        if which:
            reason = reasons.get(
                kind, f"leave nothing to divide ({kind}), so that the mask found is empty (centred may help)"
            )
            names = ", ".join(which[:5]) + (" …" if len(which) > 5 else "")
            logger.warning(f"{len(which)} images {reason}: {names}.")
