"""Opening data sets of images: from the Hub, folders, files and memory."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    ReadInstruction,
    get_dataset_config_names,
    get_dataset_default_config_name,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard
from PIL import Image
from pyarrow import parquet

from ..files import is_utf8, missing_path, near_path
from ..runtime.errors import DataError, first_sentence
from .folder_names import split_name
from .folders import FolderFiles, files_by_split, open_image_folder, say_what_is_passed_over, what_is_passed_over
from .in_memory import data_set_of, is_torch, stream_of
from .named_files import named_files, plain_folder, plain_path

BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
"""What reads files of data sets in `datasets`."""


def open_dataset(
    dataset: Any,
    *,
    split: str | None = None,
    config_name: str | None = None,
    streaming: bool = False,
    token: str | bool | None = None,
    image_column: str = "image",
) -> Dataset | IterableDataset:
    """Opens a data set by hub id, folder (of images, parquet or tar files, or saved by `datasets`) or such a file.

    A `datasets` object is returned as it is. A list of paths, PIL images or arrays is a data set, too, and a data set
    of torch is a stream; their images are in the column `image_column`. The split is by default the only one, else
    `"train"`.

    Raises:
        DataError: it cannot be found or opened, or the split is not there; the message lists the splits.
    """
    if isinstance(dataset, (Dataset, IterableDataset)):
        if split is not None and split != dataset.split:
            raise DataError(f"This data set is one split ({dataset.split or 'unnamed'}) already; leave out {split!r}.")
        return dataset
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        return _take_split(dataset, split)
    if isinstance(dataset, (list, tuple)):
        return data_set_of(dataset, image_column)
    if is_torch(dataset):
        return stream_of(dataset, image_column)
    if not isinstance(dataset, (str, os.PathLike)):
        what = "a hub id, a path, a list of images, or a data set of datasets or torch"
        raise DataError(f"A data set must be {what}, not {type(dataset).__name__}.")
    path = Path(dataset)
    if not is_utf8(path):  # neither datasets nor a head's card could say its name
        raise DataError(f"The name of data set {str(path)!a} is not UTF-8; rename it.")
    if problem := missing_path(dataset):
        raise DataError(problem)
    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return open_dataset(load_from_disk(plain_path(path)), split=split)
        source = _local_source(path, split, config_name) if path.exists() else {"path": str(dataset)}
        if isinstance(source, DatasetDict):
            return _take_split(source, split)
        _check_config(config_name, **source, token=token)
        splits = get_dataset_split_names(**source, config_name=config_name, token=token)
        chosen = _choose_split(splits, split)
        return load_dataset(**source, name=config_name, split=chosen, streaming=streaming, token=token)
    except DatasetNotFoundError as error:
        raise DataError(
            f"Data set {str(dataset)!r} is neither a file or folder here nor a data set on the Hub; "
            f"{near_path(str(dataset)) or 'check the name, or pass a token if it is private.'}"
        ) from error
    except DataError:
        raise
    except DatasetGenerationError as error:
        why = first_sentence(error.__cause__ or error)
        raise DataError(
            f"Data set {str(dataset)!r} cannot be read ({why}); mend its files, or give those that make one table."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"Data set {str(dataset)!r} cannot be opened ({first_sentence(error)}); "
            f"{near_path(str(dataset)) or 'check its name and the connection.'}"
        ) from error


def public_name(dataset: Any, opened: Dataset | IterableDataset | None = None) -> str:
    """What to call a data set where others may read it: no local path beyond its last part."""
    if isinstance(dataset, (str, os.PathLike)):
        return Path(os.path.abspath(dataset)).name if Path(dataset).exists() else str(dataset)
    if is_torch(dataset):
        return type(dataset).__name__
    return (opened.info.dataset_name if opened is not None else None) or "a data set in memory"


def source_of(dataset: Any) -> str:
    """Where a data set came from: `"hub"`, `"local"` or `"memory"`."""
    if isinstance(dataset, (str, os.PathLike)):
        return "local" if Path(dataset).exists() else "hub"
    return "memory"  # it does not say whether it was on the Hub


def _local_source(path: Path, split: str | None, config_name: str | None) -> dict[str, Any] | DatasetDict:
    """A folder of images as data sets; of anything else, the arguments of `load_dataset`."""
    if path.is_file():
        if path.suffix.lower() not in BUILDERS:
            raise DataError(f"{path} is a file but neither parquet nor tar; give a folder of images or such a file.")
        return {"path": BUILDERS[path.suffix.lower()], "data_files": named_files({"train": [path]})}
    if _has_card_with_configs(path):
        return {"path": plain_folder(path)}
    if config_name is not None:
        raise DataError(f"Folder {path} has no configs, as its README.md names none; leave out {config_name!r}.")
    files = FolderFiles.of(path)
    if files.parquet:
        rows = _count_rows(files.parquet)
        if len(files.images) >= rows:
            raise DataError(
                f"Folder {path} holds {len(files.images)} images and parquet files of {rows} rows; give the "
                "folder of the ones or of the others."
            )
    elif files.tars and files.images:
        raise DataError(
            f"Folder {path} holds {len(files.images)} images and {len(files.tars)} tar files; give the folder of the "
            "ones or of the others."
        )
    if data := files.parquet or files.tars:
        chosen = files_by_split(path, data)
        used = {file for paths in chosen.values() for file in paths}
        rest = {*files.images, *files.others, *files.parquet, *files.tars} - used
        say_what_is_passed_over(path, sorted(rest))
        return {"path": BUILDERS[data[0].suffix.lower()], "data_files": named_files(chosen)}
    if files.images:
        return open_image_folder(path, files, split)
    there = what_is_passed_over(path, files.others)
    found = f", but {there}" if there else ", since it is empty" if not any(path.iterdir()) else ""
    raise DataError(f"Folder {path} holds no images, parquet or tar files{found}; give a folder that does.")


def _check_config(config_name: str | None, **source: Any) -> None:
    configs, problem = get_dataset_config_names(**source), ""
    if config_name is None and len(configs) > 1 and not get_dataset_default_config_name(**source):
        problem = "has several configs"
    elif config_name is not None and config_name not in configs:
        problem = f"has no config {config_name!r}"
    if problem:
        raise DataError(f"The data set {problem}; choose one of {', '.join(configs)} with config_name=….")


def _has_card_with_configs(folder: Path) -> bool:
    card = folder / "README.md"
    return card.is_file() and bool(MetadataConfigs.from_dataset_card_data(DatasetCard.load(card).data))


def _count_rows(files: Sequence[Path]) -> int:
    """The rows of parquet files; a `DataError` if they have different columns, which make no one table."""
    rows, first = 0, None
    for file in files:
        about = parquet.read_metadata(file)
        schema = about.schema.to_arrow_schema()
        rows, first = rows + about.num_rows, schema if first is None else first
        if sorted(schema.names) != sorted(first.names):
            ours, theirs = (", ".join(single.names) for single in (first, schema))
            raise DataError(
                f"{files[0]} and {file} have different columns ({ours}; {theirs}) and make no one data set; give one "
                "of them, or folders that hold one kind."
            )
    return rows


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
    name, bracket, rest = split.partition("[")
    if name not in splits and split_name(name) in splits:  # val is validation
        return f"{split_name(name)}{bracket}{rest}"
    if name not in splits:
        raise DataError(f"The data set has no split {split!r}; choose one of {', '.join(splits)}.")
    return split


def undecoded(
    dataset: Dataset | IterableDataset,
    image_column: str,
    mask_column: str | None = None,
    others: Sequence[str] = (),
) -> Dataset | IterableDataset:
    """A column of images, and one of masks if it is named, as files rather than pixels: a broken one can be skipped.

    The format that the user gave the data set is taken off. `others` are columns to keep beside them.

    Raises:
        DataError: no such column, or not images (names the argument that chooses another), or a transform.
    """
    if dataset_format(dataset) == "custom":
        raise DataError(
            "The data set has a transform, which is left out where images are read as files; take it off with "
            "dataset.with_format(None), or apply it to the images with dataset.map."
        )
    dataset = dataset.with_format(None)
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
    dataset = dataset.select_columns(list(dict.fromkeys([*columns.values(), *others])))
    for column in columns.values():
        dataset = dataset.cast_column(column, ImageFeature(mode=getattr(known[column], "mode", None), decode=False))
    return dataset


def image_modes(dataset: Dataset | IterableDataset) -> dict[str, str]:
    """The modes, such as `"L"`, in which a data set wants its columns of images to be decoded."""
    kinds = (dataset.features or {}).items()
    return {name: kind.mode for name, kind in kinds if isinstance(kind, ImageFeature) and kind.mode}


def dataset_format(dataset: Dataset | IterableDataset) -> str | None:
    """What kind of rows the user has asked for: `"torch"`, `"pandas"`, …, `"custom"` for a transform."""
    formatting = dataset._formatting if isinstance(dataset, IterableDataset) else dataset.format["type"]
    return getattr(formatting, "format_type", formatting)


def _holds_images(kind: Any) -> bool:
    files = isinstance(kind, dict) and {"bytes", "path"} <= set(kind)
    return isinstance(kind, ImageFeature) or files or getattr(kind, "dtype", None) in ("binary", "large_binary")
