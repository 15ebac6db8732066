"""Opening data sets of images: from the Hub, folders, files and memory."""

import os
from pathlib import Path
from typing import Any

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    ReadInstruction,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetNotFoundError
from PIL import Image

from ..runtime.errors import DataError, first_sentence
from .image_files import files_by_split


def open_dataset(
    dataset: str | Dataset | IterableDataset | DatasetDict | IterableDatasetDict,
    *,
    split: str | None = None,
    config_name: str | None = None,
    streaming: bool = False,
    token: str | bool | None = None,
) -> Dataset | IterableDataset:
    """Opens a data set by hub id, folder (of images, of parquet files, or saved by `datasets`) or parquet file.

    A `datasets` object is returned as it is. The split is by default the only one, else `"train"`.

    Raises:
        DataError: it cannot be found or opened, or the split is not there; the message lists the splits.
    """
    if isinstance(dataset, (Dataset, IterableDataset)):
        if split is not None and split != dataset.split:
            raise DataError(f"This data set is one split ({dataset.split or 'unnamed'}) already; leave out {split!r}.")
        return dataset
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        return _take_split(dataset, split)
    if not isinstance(dataset, (str, Path)):
        raise DataError(f"A data set must be a hub id, a path or a datasets.Dataset, not {type(dataset).__name__}.")
    path = Path(dataset)
    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return open_dataset(load_from_disk(str(dataset)), split=split)
        if path.is_dir() and (folder := _image_folder(path)):
            return _take_split(folder, split)
        arguments = _parquet_arguments(path) if path.exists() else {"path": str(dataset)}
        splits = get_dataset_split_names(**arguments, config_name=config_name, token=token)
        chosen = _choose_split(splits, split)
        return load_dataset(**arguments, name=config_name, split=chosen, streaming=streaming, token=token)
    except DatasetNotFoundError as error:
        raise DataError(
            f"Data set {str(dataset)!r} is neither a file or folder here nor a data set on the Hub; check the name, "
            "or pass a token if it is private."
        ) from error
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"Data set {str(dataset)!r} cannot be opened ({first_sentence(error)}); check its name and the connection."
        ) from error


def public_name(dataset: Any, opened: Dataset | IterableDataset | None = None) -> str:
    """What to call a data set where others may read it: no local path beyond its last part."""
    if isinstance(dataset, (str, os.PathLike)):
        return Path(dataset).name if Path(dataset).exists() else str(dataset)
    return (opened.info.dataset_name if opened is not None else None) or "a data set in memory"


def _parquet_arguments(path: Path) -> dict[str, Any]:
    """Arguments of `load_dataset` for a parquet file or a folder of them."""
    if path.is_file() and path.suffix != ".parquet":
        raise DataError(f"{path} is a file but not parquet; give a folder of images or a parquet file.")
    if path.is_dir() and not any(path.rglob("*.parquet")):
        raise DataError(f"Folder {path} holds neither images nor parquet files; give a folder that does.")
    return {"path": "parquet", "data_files": str(path if path.is_file() else path / "**" / "*.parquet")}


def _image_folder(path: Path) -> DatasetDict | None:
    """The images of a folder and all below it; `None` if it holds none.

    Folders named as splits make splits. Unlike in `datasets`, names of files do not: every image counts. If all images
    of every split lie in sub-folders, two or more in all, those are classes, and name the column `label`.
    """
    splits = files_by_split(path)
    below = {split: [file.relative_to(root) for file in files] for split, (root, files) in splits.items()}
    classes = sorted({file.parts[0] for files in below.values() for file in files})
    labelled = len(classes) > 1 and all(len(file.parts) > 1 for files in below.values() for file in files)
    made = DatasetDict()
    for split, (_, files) in splits.items():
        made[split] = Dataset.from_dict({"image": list(map(str, files))}, split=split)
        made[split] = made[split].cast_column("image", ImageFeature())
        if labelled:
            labels = [classes.index(file.parts[0]) for file in below[split]]
            made[split] = made[split].add_column("label", labels, feature=ClassLabel(names=classes))
    return made or None


def _take_split(splits: DatasetDict | IterableDatasetDict, split: str | None) -> Dataset | IterableDataset:
    """One split, or a slice of one, e.g. `"train[:10%]"`."""
    name, _, rest = _choose_split(list(splits), split).partition("[")
    chosen = splits[name]
    if not rest:
        return chosen
    try:
        (part,) = ReadInstruction.from_spec(f"{name}[{rest}").to_absolute({name: len(chosen)})
    except (ValueError, TypeError) as error:
        raise DataError(f"{split!r} is no slice of the split {name} ({first_sentence(error)}).") from error
    return chosen.select(range(part.from_, part.to))


def _choose_split(splits: list[str], split: str | None) -> str:
    if split is None:
        split = splits[0] if len(splits) == 1 else "train" if "train" in splits else None
    if split is None:
        raise DataError(f"The data set has several splits; choose one of {', '.join(splits)} with split=….")
    if split.partition("[")[0] not in splits:
        raise DataError(f"The data set has no split {split!r}; choose one of {', '.join(splits)}.")
    return split


def undecoded(
    dataset: Dataset | IterableDataset, image_column: str, mask_column: str | None = None
) -> Dataset | IterableDataset:
    """A column of images, and one of masks if it is named, as files rather than pixels: a broken one can be skipped.

    Raises:
        DataError: no such column, or not images; names the argument that chooses another.
    """
    columns = {"image_column": image_column} | ({} if mask_column is None else {"mask_column": mask_column})
    features = dataset.features
    known: dict[str, Any] = next(iter(dataset), {}) if features is None else features
    for option, column in columns.items():
        if column not in known:
            there = ", ".join(known) or "none"
            raise DataError(f"The data set has no column {column!r}; choose one of {there} with {option}=….")
        kind = known[column]
        if not (isinstance(kind, (Image.Image, dict, bytes)) if features is None else _holds_images(kind)):
            raise DataError(
                f"Column {column!r} holds {type(kind).__name__ if features is None else kind}, not images; choose "
                f"another with {option}=…, or cast it with dataset.cast_column(…, datasets.Image())."
            )
    if features is None:
        return dataset
    dataset = dataset.select_columns(list(dict.fromkeys(columns.values())))
    for column in columns.values():
        dataset = dataset.cast_column(column, ImageFeature(decode=False))
    return dataset


def _holds_images(kind: Any) -> bool:
    files = isinstance(kind, dict) and {"bytes", "path"} <= set(kind)
    return isinstance(kind, ImageFeature) or files or getattr(kind, "dtype", None) in ("binary", "large_binary")
