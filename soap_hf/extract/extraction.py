"""Clean features of a data set, in a file: batch by batch, whatever its size."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset
from torch import Tensor

from ..data.arguments import ImageArguments, argument
from ..data.data_sets import open_dataset
from ..data.image_sample import ImageSample
from ..files import replacing
from ..heads.model import SOAPModelWrapper
from ..heads.running import head_preprocessor
from ..layout.probing import evaluation_mode
from ..processes import find_device
from ..runtime.errors import DataError, OutputError
from ..runtime.patch_layout import POOLINGS, Pooling
from .feature_files import FEATURE_FILES, check_columns


@dataclass(kw_only=True)
class ExtractArguments(ImageArguments):
    """Keyword arguments of [`extract_features`], and the options of `soap-hf extract`.

    Args:
        pooling (`str`, defaults to `"mean"`): `"mean"`, `"cls"` or `"cls+mean"`, as in the wrapper; `None` keeps the
            patch tokens of each image, `(*grid, D)`, in parquet as one list.
        split (`str`, *optional*): default: the only one, else `"train"`.
        num_workers (`int`, *optional*): processes that decode images; default: what the machine and the sample allow.
        dtype (`str`, *optional*): of the backbone of a head by name; default: that of the fit.

    The others are those of [`~soap_hf.data.arguments.ImageArguments`].
    """

    pooling: Pooling | None = argument(
        "mean", "One vector per image; none keeps the patch tokens.", kind=str, metavar="mean|cls|cls+mean|none"
    )
    split: str | None = argument(None, "Split; default: the only one, else train.")
    num_workers: int | None = argument(None, "Processes that decode images.", least=0)
    dtype: str | None = argument(None, "Dtype of the backbone; default: that of the fit.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pooling = None if self.pooling == "none" else self.pooling  # as the command line has it
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise DataError(f"pooling must be one of {', '.join(POOLINGS)} or None, not {self.pooling!r}.")


def extract_features(
    head: str | os.PathLike | SOAPModelWrapper,
    dataset: str | os.PathLike | Dataset | DatasetDict,
    output: str | os.PathLike,
    **arguments: Any,
) -> int:
    """Writes the clean features of every image of a data set, in its order and in constant memory.

    Unreadable images are left out and named. The file appears when it is complete.

    Args:
        head (`str` or [`SOAPModelWrapper`]): folder, hub id or live model.
        dataset: hub id, folder of images, parquet file, or a `datasets.Dataset`.
        output (`str` or `os.PathLike`): a `.parquet` file with the data set's other columns, `row` in the data set,
            `file_name` (below the folder if it is one; empty for an image that is no file) and `features` (float32
            lists of one length); or a `.safetensors` file with float32 `features` `(N, ...)`, `rows` `(N,)`, its
            columns of numbers, and `file_names` as JSON in the file's metadata.
        arguments: the fields of [`ExtractArguments`]: `pooling="mean"`, `image_column="image"`, `split=None`,
            `config_name=None`, `image_size=None`, `batch_size=32`, `num_workers=None`, `max_bad_fraction=0.01`,
            `dtype=None`, `device=None`, `revision=None`, `token=None`, `trust_remote_code=False`, `progress=True`.

    Returns:
        `int`: how many images are in the file.

    Raises:
        DataError: the data set cannot be read, is a stream, or holds too many unreadable images.
        HeadError, BackboneError: the head cannot be loaded.
        OutputError: the file has another ending, or cannot be written.
        TypeError: there is no such argument.
    """
    chosen = ExtractArguments.of("extract_features", arguments)
    target = Path(output)
    if target.suffix not in FEATURE_FILES:
        raise OutputError(f"Features go into a file that ends in {' or '.join(FEATURE_FILES)}, not {target.name!r}.")
    opened = open_dataset(dataset, split=chosen.split, config_name=chosen.config_name, token=chosen.token)
    if isinstance(opened, IterableDataset):
        raise DataError("Features are extracted from data sets of known length, not from streams; open it without.")
    sample = ImageSample(opened, chosen.image_column, None, None)
    columns = opened.remove_columns(chosen.image_column).with_format("arrow")
    root = dataset if isinstance(dataset, (str, os.PathLike)) and os.path.isdir(dataset) else None
    check_columns(columns, target.suffix)
    written = 0
    with replacing(target) as temporary:  # before anything long: can it be written?
        model = _load(head, chosen)
        reading: dict[str, Any] = {"max_bad_fraction": chosen.max_bad_fraction, "progress": chosen.progress}
        prepare, size = head_preprocessor(model, chosen.image_size).of_example, int(chosen.batch_size)
        with FEATURE_FILES[target.suffix](temporary, columns.features) as write:
            for batch in sample.read(prepare, size, chosen.num_workers, phase="features", **reading):
                others = columns[batch.positions] if columns.column_names else None
                names = [path and _below(path, root) for path in batch.paths]
                write(_features(model, batch.values, chosen.pooling), batch.positions, names, others)
                written += len(batch.positions)
            if not written:
                raise DataError("The data set holds no readable image.")
    return written


def _below(path: str, root: str | os.PathLike | None) -> str:
    """A file's name as others may read it: below its folder, or else without any."""
    below = (
        os.path.relpath(path, root) if root is not None else os.path.basename(path) if os.path.isabs(path) else path
    )
    return Path(below).as_posix()


def _load(head: Any, chosen: ExtractArguments) -> SOAPModelWrapper:
    if isinstance(head, SOAPModelWrapper):
        return head
    target = find_device(chosen.device)
    dtype: dict[str, Any] = {"dtype": chosen.dtype} if chosen.dtype else {}
    return SOAPModelWrapper.from_pretrained(head, **dtype, **chosen.hub_kwargs).to(target)


@torch.no_grad()
def _features(model: SOAPModelWrapper, pixels: Tensor, pooling: Pooling | None) -> Tensor:
    """Float32 features of a batch, on the CPU."""
    pixels = pixels.to(model.device, model.dtype)
    with evaluation_mode(model):
        features = model.patch_tokens(pixels) if pooling is None else model(pixels, pooling=pooling).image_embeds
    return features.float().cpu()
