"""Folders of images: what is in them, what is not, and how their names make splits and classes."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from datasets import ClassLabel, Dataset, DatasetDict, NamedSplit, concatenate_datasets, load_dataset
from datasets import Image as ImageFeature
from datasets.data_files import _get_data_files_patterns
from fsspec.utils import glob_translate
from PIL import Image
from transformers.utils import logging

from ..files import is_utf8
from ..runtime.errors import DataError
from ..runtime.head_files import CONFIG_FILE, is_head_config, read_json
from .folder_names import images_by_split, split_within
from .named_files import image_file, named_files, plain_path

logger = logging.get_logger(__name__)

with suppress(ImportError):  # an optional reader of .heic
    import_module("pillow_heif").register_heif_opener()

_ENDINGS = (
    ".apng .avif .bmp .dib .gif .heic .heif .j2k .jfif .jp2 .jpe .jpeg .jpf .jpg .jpx .mpo .pbm .pgm .png .pnm .ppm "
    ".tga .tif .tiff .webp"
)
PICTURES = frozenset(_ENDINGS.split())
"""Endings of photographs and drawings. Pillow reads more (films, PostScript, weather grids), but nobody means them."""

VIDEOS = {
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".mts", ".ogv", ".webm", ".wmv"),
}
"""Endings of films, which people have beside their photographs."""

NOTES = {".csv", ".htm", ".html", ".json", ".jsonl", ".log", ".md", ".rst", ".tsv", ".txt", ".xml", ".yaml", ".yml"}
"""Endings of what lies beside images and needs no word when it is passed over."""

METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
"""Files with columns of the images beside them, as `imagefolder` of datasets reads them."""

SYSTEM = {
    *("$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini"),
    *("#recycle", "#snapshot", "@eadir", "@recycle", "@recently-snapshot", "@__thumb", "@tmp", "_gsdata_"),
}
"""What systems and disks on a network leave behind, beside names that begin with a dot or two underscores."""


_MASK = re.compile(r"[-_ .]masks?([-_ ]?\d+)?$", re.IGNORECASE)


class FolderFiles(NamedTuple):
    """What a folder and all below it hold, sorted: images, parquet and tar files, metadata of images, and the rest.

    Hidden files, those of systems, and folders with heads are left out. Links are followed, no folder is read twice.
    """

    images: list[Path]
    parquet: list[Path]
    tars: list[Path]
    metadata: list[Path]
    others: list[Path]

    @classmethod
    def of(cls, folder: Path) -> "FolderFiles":
        """Looks through a folder."""
        found = cls([], [], [], [], [])
        readable = Image.registered_extensions()
        for path in sorted(_files(folder)):
            ending = path.suffix.lower()
            if not is_utf8(path):
                found.others.append(path)
            elif ending in PICTURES and ending in readable:
                found.images.append(path)
            elif path.name in METADATA:
                found.metadata.append(path)
            elif ending == ".parquet":
                found.parquet.append(path)
            elif ending == ".tar":
                found.tars.append(path)
            elif ending not in NOTES:
                found.others.append(path)
        return found


def open_image_folder(folder: Path, files: FolderFiles, split: str | None = None) -> DatasetDict:
    """The images of a folder by split, with the columns of metadata files, as `imagefolder` of datasets reads them.

    Without those, if all images of every split lie in sub-folders, two or more in all, these are classes, and name the
    column `label`. Unlike in datasets, names of images do not make splits.
    """
    if files.metadata:
        say_what_is_passed_over(folder, sorted([*files.others, *files.parquet]))
        return _with_metadata(folder, files, split)
    splits = images_by_split(folder, files.images, split)
    unused = {*files.images} - {image.path for placed in splits.values() for image in placed}
    say_what_is_passed_over(folder, sorted([*files.others, *files.parquet, *unused]))
    _say_what_may_be_masks(folder, [image.path for placed in splits.values() for image in placed])
    classes = sorted({image.name.parts[0] for placed in splits.values() for image in placed})
    deep = all(len(image.name.parts) > 1 for placed in splits.values() for image in placed)
    made = DatasetDict()
    for name, placed in splits.items():
        made[name] = Dataset.from_dict({"image": [image_file(image.path) for image in placed]}, split=name)
        made[name] = made[name].cast_column("image", ImageFeature())
        if deep and len(classes) > 1:
            labels = [classes.index(image.name.parts[0]) for image in placed]
            made[name] = made[name].add_column("label", labels, feature=ClassLabel(names=classes))
    return made


def files_by_split(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Parquet or tar files of a folder by split, by the names and rules of datasets."""
    below = {path.relative_to(folder).as_posix(): path for path in files}

    def matching(pattern: str) -> list[str]:
        return list(filter(re.compile(glob_translate(pattern)).fullmatch, below))

    patterns = _get_data_files_patterns(matching).items()
    named = {split: [name for pattern in some for name in matching(pattern)] for split, some in patterns}
    return {str(split): [below[name] for name in dict.fromkeys(names)] for split, names in named.items()}


def say_what_is_passed_over(folder: Path, paths: Sequence[Path]) -> None:
    """Counts files of a folder that are not read, by their endings, and names one of each."""
    if told := what_is_passed_over(folder, paths):
        count = "1 file is" if len(paths) == 1 else f"{len(paths)} files are"
        logger.warning(f"Of folder {folder}, {count} passed over: {told}.")


def what_is_passed_over(folder: Path, paths: Sequence[Path]) -> str:
    """Files of a folder in words: how many of each kind, and the name of one; empty for none."""
    kinds = Counter(_kind(path) for path in paths)
    named = {_kind(path): path.relative_to(folder) for path in reversed(paths)}
    return "; ".join(f"{count} {kind}, e.g. {str(named[kind])!a}" for kind, count in kinds.most_common())


def _say_what_may_be_masks(folder: Path, images: Sequence[Path]) -> None:
    """Names images that lie beside one of the same name with another ending, or with `_mask` behind it."""
    groups: dict[tuple[Path, str], list[str]] = {}
    for image in images:
        groups.setdefault((image.parent, _MASK.sub("", image.stem)), []).append(image.name)
    twins = {where: names for where, names in groups.items() if len(names) > 1}
    if twins:
        (parent, _), names = next(iter(twins.items()))
        told = " and ".join(repr(str(Path(parent, name).relative_to(folder))) for name in names[:2])
        count = sum(map(len, twins.values()))
        logger.warning(
            f"Of folder {folder}, {count} of {len(images)} images share their names with others but for the ending or "
            f"_mask, e.g. {told}, and all are read as images; if some are masks, move them into a folder of their own."
        )


def _kind(path: Path) -> str:
    if not is_utf8(path):
        return "whose name is not UTF-8 (rename them)"
    ending = path.suffix.lower()
    if ending in (".heic", ".heif"):
        return f"{ending} (to read them, pip install pillow-heif)"
    if ending in VIDEOS:
        return f"{ending} (videos; save their frames as images)"
    if ending in PICTURES or ending in (".parquet", ".tar"):
        return f"{ending} outside the splits"
    return f"without an ending that is known ({ending})" if ending else "without an ending"


def _files(folder: Path) -> Iterator[Path]:
    """Files below a folder; real folders are gone through before those that links lead to."""
    seen, to_do = set(), [folder]
    for top in to_do:
        for here, folders, names in os.walk(top):
            real = os.path.realpath(here)
            if real in seen or _is_head(here, names):
                folders.clear()
                continue
            seen.add(real)
            folders[:] = [name for name in folders if not _is_hidden(name)]
            to_do += [path for name in sorted(folders) if (path := Path(here, name)).is_symlink()]
            paths = (Path(here, name) for name in names if not _is_hidden(name))
            yield from (path for path in paths if path.is_file() or path.is_symlink())


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__")) or name.lower() in SYSTEM


def _is_head(folder: str, names: Sequence[str]) -> bool:
    try:
        return CONFIG_FILE in names and is_head_config(read_json(Path(folder, CONFIG_FILE), "a config"))
    except Exception:  # some other config.json
        return False


def _with_metadata(folder: Path, files: FolderFiles, split: str | None) -> DatasetDict:
    """The images that metadata name, with the columns that these give them.

    Raises:
        DataError: no image of the folder is named.
        ValueError: of datasets, if a file names none, or has other columns.
    """
    groups: dict[str, list[Path]] = {}  # datasets compares the columns of splits
    for path in files.metadata:
        said = map(split_within, path.parts[len(folder.parts) : -1])
        groups.setdefault(next(filter(None, said), "train"), []).append(path)
    links = {plain_path(path.parent): str(path.parent) for path in files.metadata}
    named = {name: [Path(plain_path(path.parent), path.name) for path in some] for name, some in groups.items()}
    try:
        opened = load_dataset("imagefolder", data_files=named_files(named))
    except IndexError as error:  # what datasets makes of no rows
        raise DataError(f"The metadata in {folder} have no rows; mend them, or take them away.") from error
    columns = [name for name, kind in next(iter(opened.values())).features.items() if isinstance(kind, ImageFeature)]
    if not columns:  # each row names several
        return opened
    tables = [_with_paths(single, columns, links) for single in opened.values()]
    main = "image" if "image" in columns else columns[0]
    known = {os.path.abspath(path): path for path in files.images}
    rows = [path and os.path.abspath(path) for single in tables for path in _paths(single, main)]
    there = {
        path: known.get(path) or Path(folder, os.path.relpath(path, folder))
        for path in rows
        if path and (path in known or os.path.isfile(path))
    }
    if missing := [path for path in rows if path not in there]:
        told = [os.path.relpath(path, folder) if path else "a row without a name" for path in missing[:5]]
        logger.warning(
            f"{len(missing)} of {len(rows)} rows in the metadata of {folder} name no image that is there, and are "
            f"passed over: {', '.join(told)}{' …' if missing[5:] else ''}."
        )
    if not there:
        raise DataError(f"The metadata in {folder} name no image that is there; mend its file names.")
    placed = images_by_split(folder, list(there.values()), split)
    splits = {os.path.abspath(image.path): name for name, images in placed.items() for image in images}
    used = {os.path.abspath(path) for single in tables for name in columns for path in _paths(single, name) if path}
    if unused := sum(path not in used for path in known):
        logger.warning(f"{unused} of {len(known)} images are not in the metadata, and are passed over.")
    whole = concatenate_datasets(tables)
    made = DatasetDict()
    for name in placed:
        single = Dataset(whole.data, whole.info, split=NamedSplit(name))
        made[name] = single.select([number for number, path in enumerate(rows) if path and splits.get(path) == name])
    return made


def _paths(dataset: Dataset, column: str) -> list[str | None]:
    files = dataset.cast_column(column, ImageFeature(decode=False))[column]
    return [file and file["path"] for file in files]


def _with_paths(dataset: Dataset, columns: Sequence[str], links: Mapping[str, str]) -> Dataset:
    """Paths as the user has them, without the links through which datasets came to them."""
    links = {link: folder for link, folder in links.items() if link != os.path.abspath(folder)}

    def mended(row: dict) -> dict:
        for file in filter(None, (row[name] for name in columns)):
            link = next((link for link in links if file["path"].startswith(link + os.sep)), None)
            file["path"] = file["path"] if link is None else links[link] + file["path"][len(link) :]
        return row

    if not links:
        return dataset
    kinds = dataset.features
    for name in columns:
        dataset = dataset.cast_column(name, ImageFeature(decode=False))
    return dataset.map(mended, keep_in_memory=True).cast(kinds)
