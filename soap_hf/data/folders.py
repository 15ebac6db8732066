"""Folders of images: what is in them, what is not, and how their names make splits and classes."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from datasets import Image as ImageFeature
from datasets.data_files import SPLIT_KEYWORDS, DataFilesDict, EmptyDatasetError, get_data_patterns
from PIL import Image
from transformers.utils import logging

from ..files import is_utf8
from ..runtime.errors import DataError
from ..runtime.head_files import CONFIG_FILE, is_head_config, read_json

logger = logging.get_logger(__name__)

with suppress(ImportError):  # an optional reader of .heic
    import_module("pillow_heif").register_heif_opener()

_ENDINGS = (
    ".apng .avif .bmp .dib .gif .heic .heif .j2k .jfif .jp2 .jpe .jpeg .jpf .jpg .jpx .mpo .pbm .pgm .png .pnm .ppm "
    ".tga .tif .tiff .webp"
)
PICTURES = frozenset(_ENDINGS.split())
"""Endings of photographs and drawings. Pillow reads more (films, PostScript, weather grids), but nobody means them."""

NOTES = {".csv", ".htm", ".html", ".json", ".jsonl", ".log", ".md", ".rst", ".tsv", ".txt", ".xml", ".yaml", ".yml"}
"""Endings of what lies beside images and needs no word when it is passed over."""

METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}
"""Files with columns of the images beside them, as `imagefolder` of datasets reads them."""

SYSTEM = {"@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini"}
"""What systems leave behind, beside names that begin with a dot or two underscores."""

_SPLITS = {keyword: str(split) for split, keywords in SPLIT_KEYWORDS.items() for keyword in keywords}


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


def split_name(name: str) -> str | None:
    """The split that a folder or a user calls so, by the words of datasets in any case; `None` if it is none.

    Example:
        >>> split_name("Training"), split_name("val2017"), split_name("train_station")
        ('train', 'validation', None)
    """
    return _SPLITS.get(re.sub(r"[-._ 0-9]+$", "", name.lower()))


def images_by_split(
    folder: Path, images: Sequence[Path], split: str | None = None
) -> dict[str, list[tuple[Path, Path]]]:
    """The images of each split, and the folder that each image's name is relative to.

    All are of one split, `"train"`, unless the highest folders with images are named as splits. A picture that lies
    beside such folders is passed over.

    Raises:
        DataError: beside them there are folders with images that are no splits, and no `split` is asked for.
    """
    root, folders = _where_they_part(folder, images)
    splits = {name: named for name in folders if (named := split_name(name))}
    if not splits:
        return {"train": [(root, image) for image in images]}
    if (others := [name for name in folders if name not in splits]) and split is None:
        raise DataError(
            f"Folder {root} has images in folders named as splits ({', '.join(splits)}) and in others "
            f"({', '.join(others[:5])}{' …' if len(others) > 5 else ''}); choose a split, or give a folder that holds "
            "one kind."
        )
    found: dict[str, list[tuple[Path, Path]]] = {}
    for image in images:
        if (top_name := image.relative_to(root).parts[0]) in splits:
            found.setdefault(splits[top_name], []).append((root / top_name, image))
    return found


def open_image_folder(folder: Path, files: FolderFiles, split: str | None = None) -> DatasetDict:
    """The images of a folder by split, with the columns of metadata files, as `imagefolder` of datasets reads them.

    Without those, if all images of every split lie in sub-folders, two or more in all, these are classes, and name the
    column `label`. Unlike in datasets, names of images do not make splits.
    """
    splits = images_by_split(folder, files.images, split)
    used = {image for pairs in splits.values() for _, image in pairs}
    metadata = {name: [path for path in files.metadata if _describes(path, pairs)] for name, pairs in splits.items()}
    used.update(path for paths in metadata.values() for path in paths)
    unused = {*files.images, *files.metadata} - used
    say_what_is_passed_over(folder, sorted([*files.others, *files.parquet, *unused]))
    if any(metadata.values()):
        return _with_metadata(splits, metadata)
    below = {name: [image.relative_to(root) for root, image in pairs] for name, pairs in splits.items()}
    classes = sorted({image.parts[0] for images in below.values() for image in images})
    labelled = len(classes) > 1 and all(len(image.parts) > 1 for images in below.values() for image in images)
    made = DatasetDict()
    for name, pairs in splits.items():
        made[name] = Dataset.from_dict({"image": [str(image) for _, image in pairs]}, split=name)
        made[name] = made[name].cast_column("image", ImageFeature())
        if labelled:
            labels = [classes.index(image.parts[0]) for image in below[name]]
            made[name] = made[name].add_column("label", labels, feature=ClassLabel(names=classes))
    return made


def files_by_split(folder: Path, files: Sequence[Path], ending: str) -> DataFilesDict:
    """Parquet or tar files of a folder by split, by the names and rules of datasets."""
    base = glob.escape(folder.as_posix())
    with suppress(EmptyDatasetError):
        named = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base).filter(extensions=[ending])
        if any(named.values()):
            return DataFilesDict({split: single for split, single in named.items() if single})
    return DataFilesDict.from_patterns({"train": [glob.escape(path.as_posix()) for path in files]}, base_path=base)


def say_what_is_passed_over(folder: Path, paths: Sequence[Path]) -> None:
    """Counts files of a folder that are not read, by their endings, and names one of each."""
    kinds = Counter(_kind(path) for path in paths)
    if kinds:
        named = {_kind(path): path.relative_to(folder) for path in reversed(paths)}
        told = "; ".join(f"{count} {kind}, e.g. {str(named[kind])!a}" for kind, count in kinds.most_common())
        logger.warning(f"Of folder {folder}, {len(paths)} files are passed over: {told}.")


def _where_they_part(folder: Path, images: Sequence[Path]) -> tuple[Path, list[str]]:
    """The lowest folder that holds all images, or that of one named as a split; and the folders in it with images."""
    tops = sorted({parts[0] if parts[1:] else "" for image in images if (parts := image.relative_to(folder).parts)})
    if len(tops) == 1 and tops[0] and not split_name(tops[0]):
        return _where_they_part(folder / tops[0], images)
    return folder, [top for top in tops if top]


def _kind(path: Path) -> str:
    if not is_utf8(path):
        return "whose name is not UTF-8 (rename them)"
    ending = path.suffix.lower()
    if ending in PICTURES:
        return f"{ending} (needs pillow-heif)" if ending in (".heic", ".heif") else f"{ending} outside the splits"
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


def _describes(metadata: Path, pairs: Sequence[tuple[Path, Path]]) -> bool:
    return any(metadata.is_relative_to(root) for root in {root for root, _ in pairs})


def _with_metadata(splits: dict[str, list[tuple[Path, Path]]], metadata: dict[str, list[Path]]) -> DatasetDict:
    """The images with the columns that are said of them; a `ValueError` of datasets if nothing names a file."""
    paths = {name: [*metadata[name], *(image for _, image in pairs)] for name, pairs in splits.items()}
    patterns: dict[str, list[str]] = {
        name: [glob.escape(path.as_posix()) for path in some] for name, some in paths.items()
    }
    opened = load_dataset("imagefolder", data_files=DataFilesDict.from_patterns(patterns))
    for name, pairs in splits.items():
        if (missing := len(pairs) - len(opened[name])) > 0:
            logger.warning(f"{missing} of {len(pairs)} images ({name}) are not in the metadata, and are passed over.")
    return opened
