"""Images to vectors: what a user of a head does most, in one call."""

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize as to_unit_length
from tqdm.auto import tqdm

from ..data.pictures import open_picture, picture_of
from ..layout.probing import evaluation_mode
from ..runtime.errors import DataError, MissingExtraError
from ..runtime.patch_layout import Pooling
from .running import head_preprocessor


@torch.no_grad()
def encode(
    model: Any,
    images: Any,
    *,
    batch_size: int,
    pooling: Pooling | None,
    normalize: bool,
    image_size: int | tuple[int, int] | None,
    image_column: str,
    as_tensor: bool,
    progress: bool,
) -> np.ndarray | Tensor:
    """What [`SOAPModelWrapper.encode`] does; its arguments, which have their defaults there, and errors."""
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, not {batch_size}.")
    is_one = _is_one(images)
    named, total = ([("the image", images)], 1) if is_one else _named(images, image_column)
    preprocess = head_preprocessor(model, image_size)
    found: list[Tensor] = []

    def prepare(item: tuple[str, Any]) -> Tensor:
        name, value = item
        return preprocess(open_picture(picture_of(value, name, image_column), name))

    bar = tqdm(total=total, desc="images", unit=" images", disable=not progress or is_one)
    with evaluation_mode(model), ThreadPoolExecutor() as threads, bar:
        for batch in _batches(named, batch_size):
            pixels = torch.stack(list(threads.map(prepare, batch))).to(model.device, model.dtype)
            made = model.patch_tokens(pixels) if pooling is None else model(pixels, pooling=pooling).image_embeds
            made = made.float()
            found.append((to_unit_length(made, dim=-1) if normalize else made).cpu())
            bar.update(len(batch))
    if not found:
        raise DataError("There are no images to encode; give at least one.")
    features = torch.cat(found)[0] if is_one else torch.cat(found)
    return features if as_tensor else features.numpy()


def _is_one(images: Any) -> bool:
    """Whether this is one image, and not a name of many."""
    if isinstance(images, (str, os.PathLike)):
        return os.path.isfile(images) and not os.fspath(images).endswith((".parquet", ".tar"))
    pixels = isinstance(images, (np.ndarray, Tensor)) and images.ndim <= 3
    return pixels or isinstance(images, (bytes, Image.Image))


def _named(images: Any, column: str) -> tuple[Iterable[tuple[str, Any]], int | None]:
    """The images of many, each with what to call it, and how many there are, if that is known."""
    if isinstance(images, (str, os.PathLike)):
        try:
            from ..data.data_sets import open_dataset
        except ImportError as error:
            raise MissingExtraError(
                f'{os.fspath(images)!r} is no image file, and data sets need an extra: pip install "soap-hf[fit]".'
            ) from error
        images = open_dataset(os.fspath(images))
    columns = getattr(images, "column_names", None)
    if isinstance(columns, list):  # of `datasets`
        from ..data.data_sets import undecoded

        images = undecoded(images, column)
    total = len(images) if hasattr(images, "__len__") else None
    if isinstance(images, Mapping) or not (isinstance(images, Iterable) or hasattr(images, "__getitem__")):
        kinds = "a path, a PIL image, an array, a list of those or a data set"
        raise DataError(f"Images are {kinds}, not {type(images).__name__}.")
    items = images if total is None or isinstance(images, Iterable) else (images[at] for at in range(total))
    return ((f"item {number}", item) for number, item in enumerate(items)), total


def _batches(items: Iterable[tuple[str, Any]], size: int) -> Iterator[list[tuple[str, Any]]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
