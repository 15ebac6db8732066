"""Image files: reading them, and naming those that cannot be read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from datasets import Image as ImageFeature
from PIL import ExifTags, Image, UnidentifiedImageError

from ..runtime.errors import DataError, first_sentence

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How an image is turned to be seen upright, by its EXIF orientation."""

SIDEWAYS = {TURNS[orientation] for orientation in (5, 6, 7, 8)}
"""Those that make rows of columns."""


@dataclass(frozen=True)
class BadImage:
    """An image that could not be read, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def read_image(
    value: Any, name: str, convert: Callable[[Image.Image], Image.Image] = lambda image: image, mode: str | None = None
) -> Image.Image | BadImage:
    """The pixels of one undecoded image, or why they cannot be read; `name` is for one that has no path.

    `mode` is the one that the data set asks for in its features: `convert` is given that.
    """
    try:
        image = convert(_decode(value, mode))
        image.load()
    except Exception as error:  # decoders raise what they like, and every one of them means a bad file
        known: dict[type[Exception], str] = {
            UnidentifiedImageError: "no known image format",
            FileNotFoundError: "there is no such file",
        }
        reason = known.get(type(error)) or first_sentence(error)
        return BadImage(image_name(value, name), reason)
    return image


def image_path(value: Any) -> str | None:
    """The path of an undecoded image, if it has one."""
    return (value.get("path") if isinstance(value, dict) else getattr(value, "filename", None)) or None


def image_name(value: Any, name: str) -> str:
    """The path of an undecoded image; `name` if it has none."""
    return image_path(value) or name


def turned_with_image(
    mask: Image.Image, mask_value: Any, image: Image.Image, image_value: Any
) -> tuple[Image.Image, list[str]]:
    """A mask turned as the EXIF of its image says, if it has the shape in which that is stored; and a note of it.

    Where the shape does not tell, since the turn keeps it (a mirror, half a turn, a square), the mask is taken as it
    is, and the note says so. So is one that says itself how to turn it, and that of an image in memory, which nothing
    has turned, without a note.
    """
    turn = TURNS.get(_orientation(image_value))
    if turn is None or _orientation(mask_value) in TURNS:
        return mask, []
    as_seen = _has_shape(mask.size, image.size)
    as_stored = _has_shape(mask.size, image.size[::-1]) if turn in SIDEWAYS else as_seen
    if turn in SIDEWAYS and image.width != image.height and mask.size in (image.size, image.size[::-1]):
        as_seen, as_stored = mask.size == image.size, mask.size != image.size  # nearly square
    if as_stored and not as_seen:
        return mask.transpose(turn), ["masks were turned as the EXIF orientation of their images says"]
    unknown = "masks have the shape of their images both as stored and as turned by EXIF, and were taken as they are"
    return mask, [unknown] * (as_stored and as_seen)


def _has_shape(size: tuple[int, int], of: tuple[int, int]) -> bool:
    """Whether two sizes have one aspect ratio, to a pixel of the smaller and 2 %."""
    scaled = of[0] * size[1] / of[1]
    return abs(scaled - size[0]) <= max(1.0, 0.02 * size[0])


def _orientation(value: Any) -> int:
    """The EXIF orientation of an undecoded image, 1 if it says none."""
    value = {"bytes": value, "path": None} if isinstance(value, bytes) else value
    if not isinstance(value, dict):
        return 1
    try:
        with Image.open(value["path"] if value["bytes"] is None else BytesIO(value["bytes"])) as image:
            # of HEIC, which its decoder has turned, the orientation that there was
            return image.info.get("original_orientation") or image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # EXIF that cannot be read turns nothing
        return 1


def stop_if_too_many_bad(bad: Sequence[BadImage], max_fraction: float, seen: int, expected: int) -> None:
    """Refuses to go on if more than a share of the expected images cannot be read; one may always be bad."""
    if len(bad) > max(1, int(max_fraction * expected)):
        raise DataError(
            f"Too many unreadable images ({len(bad)} among the first {seen}): {', '.join(map(str, bad))}; mend them "
            "or raise max_bad_fraction."
        )


def _decode(value: Any, mode: str | None) -> Image.Image:
    if value is None:
        raise ValueError("no image")
    if isinstance(value, bytes):
        value = {"bytes": value, "path": None}
    return value if isinstance(value, Image.Image) else ImageFeature(mode=mode).decode_example(value)
