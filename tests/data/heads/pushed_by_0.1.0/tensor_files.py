"""Reading and writing safetensors files: nothing unexpected comes in, nothing half-written stays behind."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import HeadError, OutputError

DTYPES = {"F16", "BF16", "F32", "F64", "I64"}
"""What the tensors of a head may be, by the names of safetensors."""

MAX_FILE = 1 << 27
"""Bytes of the largest file that is read: statistics of a thousand components on a grid of 64 x 64 have 40 million."""

MAX_HEADER = 1 << 20
"""Bytes of its header: that of a head of forty layers has ten thousand."""


def read_tensors(
    path: str | os.PathLike, names: set[str] | None, *, what: str, trusted: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file that must hold the tensors `names`, of real numbers, all of them finite.

    Args:
        path (`str` or `os.PathLike`): the file.
        names (`set[str]`, *optional*): the tensors it must hold, no more and no fewer; `None` reads what there is.
        what (`str`): what the file is, for error messages, e.g. `"head"`.
        trusted (`bool`, defaults to `False`): a file of the user's own, of any size and any dtypes.

    Returns:
        The tensors and the file's metadata.

    Raises:
        HeadError: the file is missing, not safetensors, larger than any head, or its tensors are missing, unexpected,
            of another dtype or not finite.
    """
    try:
        if not trusted:
            _refuse_large(Path(path))
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            if names is not None and found != names:
                missing, extra = sorted(names - found), sorted(found - names)
                raise HeadError(
                    f"The {what} {path} does not hold the tensors its config promises (missing: {missing or 'none'}, "
                    f"unexpected: {extra or 'none'}); fetch or fit it anew."
                )
            for name in sorted(found):
                if (dtype := file.get_slice(name).get_dtype()) not in DTYPES and not trusted:
                    raise HeadError(f"Tensor {name!r} of the {what} {path} is {dtype}; fetch or fit it anew.")
            tensors = {name: file.get_tensor(name) for name in sorted(found)}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise HeadError(f"The {what} {path} cannot be read as safetensors ({error}); fetch or fit it anew.") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise HeadError(f"Tensor {name!r} of the {what} {path} holds NaN or Inf; fetch or fit it anew.")
    return tensors, metadata


def _refuse_large(path: Path) -> None:
    """Refuses a file by what it claims, before any of it is read.

    Raises:
        OSError: it cannot be read, or it or its header is larger than that of any head.
    """
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > MAX_HEADER or path.stat().st_size > MAX_FILE:
        raise OSError(f"it has {path.stat().st_size} bytes, and by what it says {header} of them are its header")


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file under a temporary name, then renames it.

    Raises:
        OutputError: the file cannot be written.
    """
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
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
    except OSError as error:
        raise OutputError(f"Cannot write {target}: {error.strerror or error}; choose another folder.") from error
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        raise OutputError(f"Cannot write {target}: {error.strerror or error}; choose another folder.") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staging_folder(target: str | os.PathLike, owned: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yields an empty folder beside `target`, whose content moves into `target` if the block succeeds.

    A new folder appears at once. In one that exists files are replaced one by one, and all put back if one fails.

    Args:
        target (`str` or `os.PathLike`): the folder to write.
        owned (`tuple[str, ...]`): patterns of files that belong together with those written: any that `target` holds
            and the block did not write is removed. Every other file of `target` stays as it is.

    Raises:
        OutputError: the folder cannot be written.
    """
    target = Path(target)
    try:
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
    except OSError as error:
        raise OutputError(f"Cannot write {target}: {error.strerror or error}; choose another folder.") from error


def check_output_folder(target: str | os.PathLike, overwrite: bool) -> None:
    """Refuses, before any work, a folder that holds something or cannot be written.

    Raises:
        OutputError: says which.
    """
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
