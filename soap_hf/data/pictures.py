"""Images as people have them in Python: paths, PIL images, arrays, tensors and items of torch data sets."""

import os
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..runtime.errors import DataError, first_sentence

KINDS = (str, os.PathLike, bytes, Image.Image, np.ndarray, Tensor)
"""What one image may be."""


def open_picture(value: Any, name: str = "the image") -> Image.Image:
    """One image as PIL has it: a file upright, as its EXIF says; an image, array or tensor as it is.

    Args:
        value: a path, the bytes of a file, `{"bytes": …, "path": …}`, a PIL image, an array `(H, W)` or `(H, W, 3)` or
            a tensor `(3, H, W)`, both uint8.
        name (`str`): what a `DataError` calls one that has no path.

    Example:
        >>> open_picture(np.zeros((4, 6, 3), dtype=np.uint8)).size
        (6, 4)
    """
    if isinstance(value, Mapping) and {"bytes", "path"} >= set(value) and value:
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, (np.ndarray, Tensor)):
        return _of_numbers(value, name)
    if not isinstance(value, (str, os.PathLike, bytes)):
        raise DataError(f"An image is a path, a PIL image or an array, not {type(value).__name__} ({name}).")
    name = name if isinstance(value, bytes) else str(os.fspath(value))
    try:
        with Image.open(BytesIO(value) if isinstance(value, bytes) else value) as image:
            return ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise DataError(f"There is no image {name}; check its path.") from error
    except Exception as error:  # decoders raise what they like
        why = "no known image format" if isinstance(error, UnidentifiedImageError) else first_sentence(error)
        raise DataError(f"Image {name} cannot be read ({why}); leave it out.") from error


def picture_of(item: Any, name: str, column: str = "image") -> Any:
    """The image in an item of a data set: the item itself, the first of a tuple, or what a dict has in its column."""
    if isinstance(item, Mapping) and column in item:
        return item[column]
    if isinstance(item, (tuple, list)) and item:
        return item[0]
    if isinstance(item, (*KINDS, Mapping)):
        return item
    raise DataError(
        f"{name} is {type(item).__name__}, which holds no image; give images, tuples that start with one, or dicts "
        f"with a column {column!r}."
    )


def as_file(value: Any, name: str) -> dict[str, Any]:
    """What `datasets` keeps of an image: the path of a file, and of others the bytes, as PNG, or TIFF if need be."""
    if isinstance(value, (str, os.PathLike)):
        if not os.path.isfile(value):
            raise DataError(f"There is no image {os.fspath(value)}; check its path.")
        return {"bytes": None, "path": os.path.abspath(value)}
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, Mapping):
        return {"bytes": value.get("bytes"), "path": value.get("path")}
    image, buffer = open_picture(value, name), BytesIO()
    if image.mode in ("1", "L", "LA", "I", "P", "RGB", "RGBA", "I;16"):
        image.save(buffer, format="PNG", compress_level=1)
    else:
        image.save(buffer, format="TIFF")
    return {"bytes": buffer.getvalue(), "path": None}


def _of_numbers(value: np.ndarray | Tensor, name: str) -> Image.Image:
    array = value.detach().cpu().movedim(0, -1).numpy() if isinstance(value, Tensor) and value.ndim == 3 else value
    array = np.asarray(array)
    grey = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if array.dtype != np.uint8 or grey.ndim not in (2, 3) or (grey.ndim == 3 and grey.shape[-1] not in (3, 4)):
        what = f"{array.dtype} of shape {tuple(value.shape)}"
        raise DataError(
            f"An array is an image if it is uint8 of shape (H, W) or (H, W, 3), a tensor if it is uint8 of shape "
            f"(3, H, W), not {what} ({name}); leave out transforms, since the image processor makes the pixels."
        )
    return Image.fromarray(np.ascontiguousarray(grey))
