"""The object in a mask file: what its palette, its levels or its alpha channel say is not background."""

from typing import NamedTuple

import numpy as np
from PIL import Image

VOID = 255
"""Number of no class at all in a palette, e.g. the borders of objects in Pascal VOC."""

FEW = 32
"""Levels up to this are numbers of classes, and so many colours at most are those of objects drawn by hand."""


TWO_LEVELS, MIDDLE = "two levels, the object's being the upper", "levels above the middle"
USUAL = {TWO_LEVELS, MIDDLE, "one level"}
"""Readings that need no word."""


class Mask(NamedTuple):
    """The object in a mask, `(H, W)` bool, and how it was read, in a few words."""

    object: np.ndarray
    reading: str


def read_mask(mask: Image.Image) -> Mask:
    """The object in a mask, whatever it was saved as.

    - palette: every number but 0 and 255 (VOC, DAVIS); one whose colours are all grey is read as grey
    - alpha channel: where the colour is one alone, it is the mask; else what it hides is background
    - two levels: the upper one, whatever it is (0 and 1, 0 and 100, 1 and 2)
    - levels up to 32: numbers of classes, every one but 0
    - other grey: above 127, or above half of the highest level where that is lower; of 16 bits, above half
    - colours on black: what is not black; other colours: their brightest channel above 127

    Example:
        >>> voc = Image.new("P", (3, 1))
        >>> voc.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        >>> voc.putdata([0, 1, 2])
        >>> read_mask(voc)
        Mask(object=array([[False,  True,  True]]), reading='numbers of a palette')
    """
    if mask.mode == "P":
        numbers, colours = np.array(mask), np.array(mask.convert("RGB"))
        if not _is_grey(colours):
            return Mask((numbers > 0) & (numbers != VOID), "numbers of a palette")
        return _of_levels(colours[..., 0])
    if "A" in mask.mode or "transparency" in mask.info:
        seen, alpha = np.array(mask.convert("RGB")), np.array(mask.convert("RGBA"))[..., 3]
        if alpha.min() == alpha.max():
            return _of_colours(seen)
        if (seen == seen[0, 0]).all():
            return Mask(_of_levels(alpha).object, "alpha channel")
        found = _of_colours(seen)
        return Mask(found.object & (alpha > 127), f"{found.reading}, where alpha shows it")
    if mask.mode in ("1", "L") or mask.mode.startswith(("I", "F")):
        return _of_levels(np.array(mask))
    return _of_colours(np.array(mask.convert("RGB")))


def _is_grey(colours: np.ndarray) -> bool:
    return bool((colours == colours[..., :1]).all())


def _of_colours(colours: np.ndarray) -> Mask:
    if _is_grey(colours):
        return _of_levels(colours[..., 0])
    known = np.unique(colours.reshape(-1, 3), axis=0)
    if len(known) <= FEW and not known[0].any():
        return Mask(np.any(colours, axis=-1), "colours on black")
    if len(known) == 2:
        return Mask(np.all(colours == known[1], axis=-1), "two colours, the object's being the brighter")
    return Mask(colours.max(axis=-1) > 127, "brightest channel above 127")


def _of_levels(levels: np.ndarray) -> Mask:
    known = np.unique(levels)
    low, high = known[0], known[-1]
    if len(known) == 1:
        return Mask(levels > 0, "one level")
    if len(known) == 2:
        return Mask(levels == high, TWO_LEVELS)
    if low >= 0 and high <= FEW and levels.dtype.kind in "ui":
        return Mask(levels > 0, "numbers of classes")
    threshold = 127 if 127 < high <= 255 else high / 2
    return Mask(levels > threshold, MIDDLE)
