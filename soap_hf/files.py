"""Writing files and folders: whole or not at all, so that nothing half-written stays behind."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .runtime.errors import OutputError


def missing_path(name: str | os.PathLike, *, word_is_path: bool = False) -> str | None:
    """A sentence about a name that can only be a path, and is not there; `None` if it is, or may be a hub id.

    Such a name begins with `/`, `.` or `~`, ends in `/`, has two or more of them, or begins with a folder that is
    here; and if `word_is_path`, it is a single word, which only few data sets on the Hub have for their name.

    Example:
        >>> missing_path("./photos/trian")
        "There is no file or folder './photos/trian'; check the path."
        >>> missing_path("facebook/dinov2-small") is None
        True
    """
    text = os.fspath(name)
    if not text or os.path.exists(text):
        return None
    parent = os.path.dirname(text.rstrip("/\\"))
    is_path = text.startswith(("/", ".", "~")) or text.endswith(("/", "\\")) or text.count("/") > 1
    if is_path or os.path.isdir(parent) or (word_is_path and "/" not in text):
        owner = "" if is_path or "/" in text else ", or give a hub id with its owner (owner/name)"
        return f"There is no file or folder {text!r}; {near_path(text) or f'check the path{owner}.'}"
    return None


def near_path(name: str) -> str:
    """A question whether a path nearly of this name is meant; empty if there is none."""
    parent, last = os.path.split(name.rstrip("/\\"))
    try:
        there = os.listdir(parent or ".")
    except (OSError, ValueError):  # there is no such folder either
        return ""
    near = get_close_matches(last, [one for one in there if not one.startswith(".")], n=1)
    return f"did you mean {os.path.join(parent, near[0])!r}?" if near else ""


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file under a temporary name, then renames it; an `OutputError` if it cannot."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata={"format": "pt", **metadata})
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(str(error)) from error


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it onto `path` if the block succeeds, removes it if not."""
    target = Path(path)
    with writing(target):
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def staging_folder(target: str | os.PathLike, owned: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yields an empty folder beside `target`, whose content moves into `target` if the block succeeds.

    A new folder appears at once. In one that exists files are replaced one by one, and all put back if one fails. Of
    its other files, those that match a pattern of `owned` are removed, since they belong with those written.
    """
    target = Path(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
            new, old = Path(name, "new"), Path(name, "old")
            new.mkdir()
            yield new
            for written in new.rglob("*"):
                if written.is_file():
                    written.chmod(0o666 & ~_umask())  # safetensors writes for its owner alone
            if target.exists():
                _replace_files(new, target, old, owned)
            else:
                new.rename(target)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Makes an `OutputError` of what goes wrong with a file or folder; refuses at once a name that is not UTF-8."""
    if not is_utf8(os.path.abspath(target)):  # cards, parquet and torch would fail on it when all work is done
        raise OutputError(f"Cannot write {str(target)!a}, whose path is not UTF-8; choose another folder.")
    try:
        yield
    except OSError as error:
        raise OutputError(f"Cannot write {target}: {error.strerror or error}; choose another folder.") from error


def check_output_folder(target: str | os.PathLike, overwrite: bool) -> None:
    """Refuses, before any work, a folder that holds something or cannot be written."""
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file; choose a folder.")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise OutputError(f"{target} is not empty; choose another folder or pass --overwrite.")
    is_new = not target.exists()
    with staging_folder(target):
        pass
    if is_new:  # work that fails leaves no empty folder
        target.rmdir()


def is_utf8(path: str | os.PathLike) -> bool:
    """Whether a path is text, and not bytes of another encoding, which Python keeps as surrogates."""
    try:
        return bool(os.fspath(path).encode())
    except UnicodeEncodeError:
        return False


def _replace_files(new: Path, target: Path, old: Path, owned: tuple[str, ...]) -> None:
    """Moves files of `new` into `target`, and those that they replace into `old`; puts all back on an error."""
    arriving = [path.relative_to(new) for path in sorted(new.rglob("*")) if path.is_file()]
    stale = [path.relative_to(target) for pattern in owned for path in sorted(target.glob(pattern))]
    done: list[tuple[Path, Path]] = []

    def move(source: Path, destination: Path) -> None:
        destination.parent.mkdir(parents=True, exist_ok=True)
        source.replace(destination)
        done.append((source, destination))

    try:
        for path in dict.fromkeys([*arriving, *stale]):
            if (target / path).exists():
                move(target / path, old / path)
        for path in arriving:
            move(new / path, target / path)
    except OSError:
        for source, destination in reversed(done):
            destination.replace(source)
        raise
    finally:
        for folder in {(target / path).parent for path in (*arriving, *stale)} - {target}:
            with suppress(OSError):
                folder.rmdir()  # if nothing is left in it


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
