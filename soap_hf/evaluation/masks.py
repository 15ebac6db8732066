"""The object in a mask file: what its palette, its levels or its alpha channel say is not background."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..runtime.errors import DataError

VOID = 255
"""Number of no class at all in a palette, e.g. the borders of objects in Pascal VOC."""

FEW = 32
"""Levels up to this are numbers of classes, and so many levels or colours at most are those of masks drawn by hand."""

VISIBLE = 127
"""Alpha above this shows a colour."""

TWO_LEVELS, MIDDLE = "two levels, the object's being the upper", "levels above the middle"
USUAL = {TWO_LEVELS, MIDDLE, "one level"}
"""Readings that need no word."""


class Mask(NamedTuple):
    """The object in a mask, `(H, W)` bool, and how it was read, in a few words."""

    object: np.ndarray
    reading: str


def read_mask(mask: Image.Image, levels: tuple[float, ...] = ()) -> Mask:
    """The object in a mask, whatever it was saved as.

    - palette: every number but 255 and the background's, which is 0 (VOC, DAVIS), or that of black where 0 is another
      colour and black is used; one whose colours are all grey is read as grey
    - alpha that hides something: it is the mask of a cut-out, which shows one colour or a picture; where it shows a
      few colours, those are read, and what it hides is background
    - two levels: the upper one, whatever it is (0 and 1, 0 and 100, 1 and 2)
    - levels up to 32, or at most 32 of which one between the lowest and the highest fills 3 x 3 pixels: numbers of
      classes, every one but 0
    - other grey: above 127, or above half of the highest level where that is lower; of 16 bits, above half
    - colours on black: what is not black; other colours: their brightest channel above 127

    Args:
        mask (`PIL.Image`): as the file has it.
        levels (`tuple[float]`, *optional*): those of all masks of the data set, by `levels_of_all`, which say what the
            levels of a mask mean that has one or two.

    Raises:
        DataError: numbers of classes without 0, which could each be the background.

    Example:
        >>> voc = Image.new("P", (3, 1))
        >>> voc.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        >>> voc.putdata([0, 1, 2])
        >>> read_mask(voc)
        Mask(object=array([[False,  True,  True]]), reading='numbers of a palette')
    """
    grey = _grey(mask)
    if grey is not None:
        return _of_levels(grey, levels)
    alpha = _hiding_alpha(mask)
    if mask.mode == "P" and alpha is None:
        return _of_palette(mask)
    seen = np.array(mask.convert("RGB"))
    if alpha is None:
        return _of_colours(seen)
    visible = _of_levels(alpha).object
    shown = np.unique(seen[visible], axis=0)
    if len(shown) == 1 or len(shown) > min(FEW, visible.sum() / 4):
        return Mask(visible, "alpha channel")
    found = _of_colours(seen)
    return Mask(found.object & visible, f"{found.reading}, where alpha shows it")


def few_levels(mask: Image.Image) -> tuple[float, ...] | None:
    """The levels of a grey mask if they are few; none of one that is not grey, and `None` of many."""
    grey = _grey(mask)
    known = [] if grey is None else np.unique(grey).tolist()
    return tuple(known) if len(known) <= FEW else None


def levels_of_all(found: Iterable[tuple[float, ...] | None]) -> tuple[float, ...]:
    """The levels of all masks of a data set from `few_levels` of each, if they are few; else none."""
    known: set[float] = set()
    for levels in found:
        if levels is None or len(known := known | {*levels}) > FEW:
            return ()
    return tuple(sorted(known))


def _grey(mask: Image.Image) -> np.ndarray | None:
    """The levels of a mask that has those alone, `(H, W)`."""
    if mask.mode in ("1", "L") or mask.mode.startswith(("I", "F")):
        return np.array(mask)
    if _hiding_alpha(mask) is not None:
        return None
    colours = np.array(mask.convert("RGB"))
    return colours[..., 0] if bool((colours == colours[..., :1]).all()) else None


def _hiding_alpha(mask: Image.Image) -> np.ndarray | None:
    """The alpha channel of a mask, `(H, W)`, if it hides something but not all; of a palette, if that is a picture."""
    if "A" not in mask.mode and "transparency" not in mask.info:
        return None
    if mask.mode == "P" and len(np.unique(np.array(mask))) <= FEW:
        return None
    alpha = np.array(mask.convert("RGBA"))[..., 3]
    return None if alpha.min() == alpha.max() or alpha.min() > VISIBLE else alpha


def _of_palette(mask: Image.Image) -> Mask:
    numbers, colours = np.array(mask), np.array(mask.convert("RGB"))
    black = np.unique(numbers[~colours.any(axis=-1)])
    first = (mask.getpalette() or [0])[:3]
    if any(first) and len(black):  # made from colours, in whatever order
        return Mask(~np.isin(numbers, black), "numbers of a palette whose black is the background")
    return Mask((numbers > 0) & (numbers != VOID), "numbers of a palette")


def _of_colours(colours: np.ndarray) -> Mask:
    known = np.unique(colours.reshape(-1, 3), axis=0)
    if (known == known[:, :1]).all():
        return _of_levels(colours[..., 0])
    if len(known) <= FEW and not known[0].any():
        return Mask(np.any(colours, axis=-1), "colours on black")
    if len(known) == 2:
        return Mask(np.all(colours == known[1], axis=-1), "two colours, the object's being the brighter")
    return Mask(colours.max(axis=-1) > 127, "brightest channel above 127")


def _of_levels(levels: np.ndarray, of_all: tuple[float, ...] = ()) -> Mask:
    known = np.unique(levels)
    everywhere = sorted({*known.tolist(), *of_all})
    low, high = everywhere[0], known[-1]
    if len(known) == 1:
        return Mask(levels > (low if len(everywhere) > 1 else 0), "one level")
    if len(known) == 2 and known[0] == low:
        return Mask(levels == high, TWO_LEVELS)
    if levels.dtype.kind in "ui" and (len(known) == 2 or _are_numbers(levels, known)):
        if 0 not in everywhere:
            some = ", ".join(map(str, everywhere[:5])) + (" …" if len(everywhere) > 5 else "")
            raise DataError(f"Masks have the levels {some}: save the background as 0, which none of them is.")
        return Mask(levels > 0, "numbers of classes")
    threshold = 127 if 127 < high <= 255 else high / 2
    return Mask(levels > threshold, MIDDLE)


def _are_numbers(levels: np.ndarray, known: np.ndarray) -> bool:
    """Whether levels are of classes: low ones, or few of which one between fills an area, as no soft border does."""
    if len(known) > FEW:
        return False
    if known[0] >= 0 and known[-1] <= FEW:
        return True
    if min(levels.shape) < 3:
        return False
    areas = np.lib.stride_tricks.sliding_window_view(levels, (3, 3))
    middle = areas[..., 1, 1]
    between = (middle > known[0]) & (middle < known[-1])
    return bool((areas[between] == middle[between][:, None, None]).all(axis=(1, 2)).any())
