"""Opening data sets of images: from the Hub, folders, files and memory."""

from pathlib import Path
from typing import Any

from datasets import (
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

from .errors import DataError, first_sentence

SPLIT_FOLDERS = {"train", "test", "val", "validation"}

IMAGE_EXTENSIONS = {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def open_dataset(
    dataset: str | Dataset | IterableDataset | DatasetDict | IterableDatasetDict,
    *,
    split: str | None = None,
    config_name: str | None = None,
    streaming: bool = False,
    token: str | bool | None = None,
) -> Dataset | IterableDataset:
    """Opens a data set by hub id, folder (of images, of parquet files, or saved by `datasets`) or parquet file.

    Args:
        dataset: hub id, path, or a `datasets` object, which is returned as it is.
        split (`str`, *optional*): default: the only one, else `"train"`.
        config_name (`str`, *optional*): configuration of a hub data set.
        streaming (`bool`, defaults to `False`): do not download the whole set first.
        token (`str` or `bool`, *optional*): for the Hub.

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
    try:
        if Path(dataset).is_dir() and not _is_saved(Path(dataset)) and (folder := _image_folder(Path(dataset))):
            return open_dataset(folder, split=split)
        arguments = _builder_arguments(Path(dataset)) if Path(dataset).exists() else {"path": str(dataset)}
        if arguments is None:
            return open_dataset(load_from_disk(str(dataset)), split=split)
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


def _is_saved(path: Path) -> bool:
    """Whether `datasets` has written this folder with `save_to_disk`."""
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def _builder_arguments(path: Path) -> dict[str, Any] | None:
    """Arguments of `load_dataset` for a local path; `None` for a folder that `save_to_disk` wrote."""
    if path.is_file():
        if path.suffix == ".parquet":
            return {"path": "parquet", "data_files": str(path)}
        raise DataError(f"{path} is a file but not parquet; give a folder of images or a parquet file.")
    if _is_saved(path):
        return None
    if any(path.rglob("*.parquet")):
        return {"path": "parquet", "data_files": str(path / "**" / "*.parquet")}
    raise DataError(f"Folder {path} holds neither images nor parquet files; give a folder that does.")


def _image_folder(path: Path) -> DatasetDict | None:
    """The images of a folder and all below it; `None` if it holds none.

    Folders named as splits make splits. Unlike in `datasets`, names of files do not: every image counts.
    """
    files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in IMAGE_EXTENSIONS and file.is_file()]
    if not files:
        return None
    tops = [file.relative_to(path).parts[0] for file in files]
    by_split: dict[str, list[str]] = {}
    for file, top in zip(files, tops, strict=True):
        by_split.setdefault(top if set(tops) <= SPLIT_FOLDERS else "train", []).append(str(file))
    return DatasetDict(
        {
            split: Dataset.from_dict({"image": paths}, split=split).cast_column("image", ImageFeature())
            for split, paths in by_split.items()
        }
    )


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
    if split is not None:
        if split.partition("[")[0] not in splits:
            raise DataError(f"The data set has no split {split!r}; choose one of {', '.join(splits)}.")
        return split
    if len(splits) == 1:
        return splits[0]
    if "train" in splits:
        return "train"
    raise DataError(f"The data set has several splits; choose one of {', '.join(splits)} with split=….")
