"""Clean features of a data set, in a file: batch by batch, whatever its size."""

import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from .call_convention import evaluation_mode, native_image_size
from .data import open_dataset
from .errors import DataError, OutputError
from .feature_files import FEATURE_FILES, FEATURES, ROWS
from .fit_inputs import find_device
from .image_files import BadImage, stop_if_too_many_bad
from .image_sample import ImageSample, default_workers
from .modeling_soap import SOAPModelWrapper
from .patch_layout import as_size
from .pooling import POOLINGS, Pooling
from .preprocessing import ImagePreprocessor, load_image_processor
from .tensor_files import replacing

logger = logging.get_logger(__name__)


def extract_features(
    head: str | os.PathLike | SOAPModelWrapper,
    dataset: str | os.PathLike | Dataset | DatasetDict,
    output: str | os.PathLike,
    *,
    pooling: Pooling | None = "mean",
    image_column: str = "image",
    split: str | None = None,
    config_name: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 32,
    num_workers: int | None = None,
    max_bad_images: float = 0.01,
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> int:
    """Writes the clean features of every image of a data set, in its order and in constant memory.

    Unreadable images are left out and named. The file appears when it is complete.

    Args:
        head (`str` or [`SOAPModelWrapper`]): folder, hub id or live model.
        dataset: hub id, folder of images, parquet file, or a `datasets.Dataset`.
        output (`str` or `os.PathLike`): a `.parquet` file with the data set's other columns and a column `features`
            (float32 lists of one length); or a `.safetensors` file with float32 `features` `(N, ...)`, `rows` `(N,)`
            in the data set, and its columns of numbers.
        pooling (`str`, defaults to `"mean"`): `"mean"`, `"cls"` or `"cls+mean"`, as in the wrapper; `None` keeps the
            patch tokens of each image, `(*grid, D)`, in parquet as one list.
        image_column, split, config_name, batch_size, num_workers, max_bad_images, trust_remote_code: as in
            `fit_soap`.
        image_size (`int` or `(height, width)`, *optional*): default: the image processor's.
        dtype, device, revision, token: for loading a head by name.
        progress (`bool`, defaults to `True`): show a bar.

    Returns:
        `int`: how many images are in the file.

    Raises:
        DataError: the data set cannot be read, is a stream, or holds too many unreadable images.
        HeadError, BackboneError: the head cannot be loaded.
        OutputError: the file has another ending, or cannot be written.
    """
    target = Path(output)
    if target.suffix not in FEATURE_FILES:
        raise OutputError(f"Features go into a file that ends in {' or '.join(FEATURE_FILES)}, not {target.name!r}.")
    if pooling is not None and pooling not in POOLINGS:
        raise DataError(f"pooling must be one of {', '.join(POOLINGS)} or None, not {pooling!r}.")
    opened = open_dataset(dataset, split=split, config_name=config_name, token=token)
    if isinstance(opened, IterableDataset):
        raise DataError("Features are extracted from data sets of known length, not from streams; open it without.")
    sample = ImageSample(opened, image_column, None, None)
    columns = opened.remove_columns(image_column).with_format("arrow")
    if taken := {FEATURES, ROWS} & set(columns.column_names):
        raise DataError(f"The data set has a column {taken.pop()!r} already; rename it with dataset.rename_column.")
    with replacing(target) as temporary:  # before anything long: can it be written?
        model = _load(head, dtype, device, revision=revision, token=token, trust_remote_code=trust_remote_code)
        preprocess = _preprocessor(model, as_size(image_size))
        workers = default_workers(sample.available) if num_workers is None else num_workers
        bad: list[BadImage] = []
        with FEATURE_FILES[target.suffix](temporary, columns.features) as file, tqdm(
            total=len(opened), desc="features", unit=" images", disable=not progress
        ) as bar:  # fmt: skip
            seen = 0
            for pixels, unread, rows in sample.batches(preprocess, batch_size, workers):
                bad += unread
                seen += len(rows) + len(unread)
                stop_if_too_many_bad(bad, max_bad_images, seen, len(opened))
                if pixels is not None:
                    file.write(
                        _features(model, pixels, pooling), rows, columns[rows] if columns.column_names else None
                    )
                bar.update(len(rows) + len(unread))
            if len(bad) == len(opened):
                raise DataError("The data set holds no readable image.")
    if bad:
        logger.warning(f"{len(bad)} unreadable images were left out: {', '.join(map(str, bad))}.")
    return len(opened) - len(bad)


def _load(head: Any, dtype: str | None, device: str | None, **options: Any) -> SOAPModelWrapper:
    if isinstance(head, SOAPModelWrapper):
        return head
    target = find_device(device)
    given = {name: value for name, value in {"dtype": dtype, **options}.items() if value}
    return SOAPModelWrapper.from_pretrained(head, **given).to(target)


def _preprocessor(model: SOAPModelWrapper, image_size: tuple[int, int] | None) -> ImagePreprocessor:
    native = native_image_size(model.backbone.config)
    processor = model.image_processor or load_image_processor(
        model.config.backbone_name_or_path, image_size or native or (224, 224)
    )
    return ImagePreprocessor(processor, image_size, native)


@torch.no_grad()
def _features(model: SOAPModelWrapper, pixels: Tensor, pooling: Pooling | None) -> Tensor:
    """Float32 features of a batch, on the CPU."""
    pixels = pixels.to(model.device, model.dtype)
    with evaluation_mode(model):
        features = model.patch_tokens(pixels) if pooling is None else model(pixels, pooling=pooling).image_embeds
    return features.float().cpu()
