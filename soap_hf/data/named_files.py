"""Files that the user named, handed to `datasets` so that it takes no part of their names for something else."""

import glob
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
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
    if not link.is_symlink():
        link.symlink_to(absolute, target_is_directory=path.is_dir())
    return str(link)


def plain_folder(folder: Path) -> str:
    """The same for a folder that `datasets` resolves: one with links to what is in it."""
    if is_plain(str(folder.resolve())):
        return str(folder)
    links = _in_cache(str(folder.resolve()))
    shutil.rmtree(links, ignore_errors=True)
    links.mkdir(parents=True)
    for path in folder.resolve().iterdir():
        (links / path.name).symlink_to(path, target_is_directory=path.is_dir())
    return str(links)


def is_plain(path: str) -> bool:
    """Whether a path means itself alone: no pattern, `$VARIABLE`, `~`, or `::`, which chains files."""
    return glob.escape(path) == path and not path.startswith("~") and "$" not in path and "::" not in path


def _in_cache(path: str) -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "soap-hf-links" / hashlib.sha256(path.encode()).hexdigest()[:16]
