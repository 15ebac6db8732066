"""Images that people bring: read once, of bounded size, with a word on what was made of them."""

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..data.image_files import BadImage, read_image
from ..data.preprocessing import to_rgb
from ..runtime.errors import DataError, first_sentence

LARGEST_SIDE = 1536
"""Pixels; larger images are scaled down to that, since nothing on the page would show more."""

MOST_PIXELS = 100_000_000
"""Images of more are not read: a small file can hold more pixels than the memory."""

LONGEST_NAME = 60


@dataclass(frozen=True)
class Photo:
    """An image to look at.

    Attributes:
        name (`str`): what to call it.
        image (`PIL.Image.Image`): RGB.
        notes (`tuple[str, ...]`): what was made of the file, in half sentences.
    """

    name: str
    image: Image.Image
    notes: tuple[str, ...] = ()


def read_photo(path: str | os.PathLike, name: str | None = None) -> Photo:
    """Reads an image file: the first frame of an animation, upright, opaque, up to 1,536 pixels a side.

    Args:
        path (`str` or `os.PathLike`): the file.
        name (`str`, *optional*): what to call it; default: the file's name.

    Raises:
        DataError: it is no image that can be read, or has more than 100 million pixels.
    """
    name = _short("".join(filter(str.isprintable, name or Path(path).name)))
    with warnings.catch_warnings(), _refusing(name):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MOST_PIXELS is the limit
        with Image.open(path) as file:  # reads no pixels yet
            count, notes = math.prod(file.size), _notes(file)
    if count > MOST_PIXELS:
        raise DataError(f"{name} has {count / 1e6:.0f} million pixels; choose an image of up to 100 million.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = read_image({"path": os.fspath(path), "bytes": None}, name, to_rgb)
    if isinstance(image, BadImage):
        raise DataError(_refusal(name, image.reason))
    if max(image.size) > LARGEST_SIDE:
        before = image.size
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
        notes = (*notes, f"scaled from {before[0]} × {before[1]} to {image.width} × {image.height} pixels")
    return Photo(name, image, notes)


def _notes(file: Image.Image) -> tuple[str, ...]:
    frames = getattr(file, "n_frames", 1)
    animated = [f"the first of its {frames} frames"] if frames > 1 else []
    return (*animated, *(["its transparency is left out"] if file.has_transparency_data else []))


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Puts whatever a decoder raises into a sentence."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} has too many pixels; choose an image of up to 100 million.") from error
    except Exception as error:  # decoders raise what they like
        unknown = isinstance(error, UnidentifiedImageError)
        raise DataError(_refusal(name, "no known image format" if unknown else first_sentence(error))) from error


def _refusal(name: str, reason: str) -> str:
    return f"{name} cannot be read as an image ({reason}); choose another file."


def _short(name: str) -> str:
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half + 1 :]}"
