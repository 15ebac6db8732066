"""Files that the user named, handed to `datasets` so that it takes no part of their names for something else."""

import glob
import hashlib
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import datasets
from datasets.data_files import DataFilesDict, DataFilesList


def named_files(files: Mapping[str, Iterable[Path]]) -> DataFilesDict:
    """Files by split, as `load_dataset` takes them."""
    made = DataFilesDict()
    for split, paths in files.items():
        plain = [plain_path(path) for path in paths]
        made[split] = DataFilesList(plain, [(str(os.path.getmtime(path)),) for path in plain])
    return made


def plain_path(path: Path) -> str:
    """An absolute path in which `datasets` finds no pattern, variable or chain: if need be, of a link in its cache."""
    absolute = os.path.abspath(path)
    if is_plain(absolute):
        return absolute
    link = _in_cache(absolute).with_suffix(path.suffix if is_plain(path.suffix) else "")
    link.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # of an earlier run, or of another process
        link.symlink_to(absolute, target_is_directory=path.is_dir())
    return str(link)


def plain_folder(folder: Path) -> str:
    """The same for a folder that `datasets` resolves: one with links to what is in it."""
    real = folder.resolve()
    if is_plain(str(real)):
        return str(folder)
    links, names = _in_cache(str(real)), os.listdir(real)
    links.mkdir(parents=True, exist_ok=True)
    for name in {*os.listdir(links)} - {*names}:
        (links / name).unlink(missing_ok=True)
    for name in names:
        with suppress(FileExistsError):
            (links / name).symlink_to(real / name, target_is_directory=(real / name).is_dir())
    return str(links)


def image_file(path: str | os.PathLike) -> str:
    """A path that `datasets.Image` opens as a file: it takes what precedes a colon in a relative one for a scheme."""
    return os.path.abspath(path) if ":" in str(path) else str(path)


def is_plain(path: str) -> bool:
    """Whether a path means itself alone: no pattern, `$VARIABLE`, `~`, or `::`, which chains files."""
    return glob.escape(path) == path and not path.startswith("~") and "$" not in path and "::" not in path


def _in_cache(path: str) -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "soap-hf-links" / hashlib.sha256(path.encode()).hexdigest()[:16]
