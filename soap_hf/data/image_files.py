"""Image files: reading them, and naming those that cannot be read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Image as ImageFeature
from PIL import Image, UnidentifiedImageError

from ..runtime.errors import DataError, first_sentence


@dataclass(frozen=True)
class BadImage:
    """An image that could not be read, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def read_image(
    value: Any, name: str, convert: Callable[[Image.Image], Image.Image] = lambda image: image
) -> Image.Image | BadImage:
    """The pixels of one undecoded image, or why they cannot be read; `name` is for one that has no path."""
    try:
        image = convert(_decode(value))
        image.load()
    except Exception as error:  # decoders raise what they like, and every one of them means a bad file
        reason = "no known image format" if isinstance(error, UnidentifiedImageError) else first_sentence(error)
        return BadImage(image_name(value, name), reason)
    return image


def image_path(value: Any) -> str | None:
    """The path of an undecoded image, if it has one."""
    return (value.get("path") if isinstance(value, dict) else getattr(value, "filename", None)) or None


def image_name(value: Any, name: str) -> str:
    """The path of an undecoded image; `name` if it has none."""
    return image_path(value) or name


def stop_if_too_many_bad(bad: Sequence[BadImage], max_fraction: float, seen: int, expected: int) -> None:
    """Refuses to go on if more than a share of the expected images cannot be read; one may always be bad."""
    if len(bad) > max(1, int(max_fraction * expected)):
        raise DataError(
            f"Too many unreadable images ({len(bad)} among the first {seen}): {', '.join(map(str, bad))}; mend them "
            "or raise max_bad_fraction."
        )


def _decode(value: Any) -> Image.Image:
    if value is None:
        raise ValueError("no image")
    if isinstance(value, bytes):
        value = {"bytes": value, "path": None}
    return value if isinstance(value, Image.Image) else ImageFeature().decode_example(value)
