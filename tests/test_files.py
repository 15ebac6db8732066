"""Files appear whole or not at all, and only what was asked for is read."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from soap_hf import files
from soap_hf.files import check_output_folder, replacing, staging_folder, write_tensors
from soap_hf.runtime.errors import HeadError, OutputError
from soap_hf.runtime.head_files import read_tensors

TENSORS = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(2, dtype=torch.float64)}


def read(path: Path, *names: str):
    return read_tensors(path, set(names), what="head")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_tensors_and_metadata_come_back(tmp_path):
    write_tensors(tmp_path / "file", TENSORS, {"images": "7"})
    tensors, metadata = read(tmp_path / "file", "a", "b", "c")
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert all(tensors[name].dtype == TENSORS[name].dtype for name in TENSORS)
    assert metadata == {"format": "pt", "images": "7"}
    assert list(tree(tmp_path)) == ["file"]


def test_tensors_may_need_gradients_and_lie_in_any_order(tmp_path):
    tensor = torch.randn(4, 3, requires_grad=True)
    write_tensors(tmp_path / "file", {"a": tensor.T}, {})
    assert torch.equal(read(tmp_path / "file", "a")[0]["a"], tensor.T)


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "file", TENSORS, {})
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("names", ["ab", "abcd", "abd", ""])
def test_other_tensors_than_expected_are_refused(tmp_path, names):
    write_tensors(tmp_path / "file", TENSORS, {})
    with pytest.raises(HeadError, match=r"The head .*file does not hold"):
        read(tmp_path / "file", *names)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    save_file({"a": torch.tensor([1.0, value])}, tmp_path / "file")
    with pytest.raises(HeadError, match=r"'a'.*NaN or Inf"):
        read(tmp_path / "file", "a")


def test_files_without_metadata_are_read(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "file")
    assert read(tmp_path / "file", "a")[1] == {}


@pytest.mark.parametrize("content", [None, b"", b"\x80\x04K\x01.", bytes(64)])
def test_what_is_not_safetensors_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(HeadError, match="cannot be read as safetensors"):
        read(tmp_path / "file", "a")


def test_only_a_file_of_the_users_own_may_be_of_any_size_and_dtype(tmp_path, monkeypatch):
    large, flags = tmp_path / "large", tmp_path / "flags"
    write_tensors(large, {"a": torch.ones(8)}, {})
    write_tensors(flags, {"a": torch.ones(8, dtype=torch.bool)}, {})
    monkeypatch.setattr("soap_hf.runtime.head_files.MAX_FILE", 64)
    for path in (large, flags):
        with pytest.raises(HeadError):
            read(path, "a")
        assert read_tensors(path, {"a"}, what="checkpoint", trusted=True)[0]["a"].all()


def test_a_truncated_file_is_refused(tmp_path):
    write_tensors(tmp_path / "file", TENSORS, {})
    whole = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(whole[:-8])
    with pytest.raises(HeadError, match="cannot be read as safetensors"):
        read(tmp_path / "file", "a", "b", "c")


NO_SPACE = (
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("No space left on device"),
)


@pytest.mark.parametrize("error", NO_SPACE, ids=["from Python", "from safetensors"])
def test_a_failed_write_is_said_and_changes_nothing(tmp_path, monkeypatch, error):
    write_tensors(tmp_path / "file", TENSORS, {})
    before = tree(tmp_path)

    def half_written(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(files, "save_file", half_written)
    for name in ("file", "new"):
        with pytest.raises(OutputError, match="No space left on device"):
            write_tensors(tmp_path / name, TENSORS, {})
        assert tree(tmp_path) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_replacement_changes_nothing(tmp_path, error):
    (tmp_path / "file").write_text("old")

    def replace_partly() -> None:
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("new")
            raise error

    with pytest.raises(error):
        replace_partly()
    assert tree(tmp_path) == {"file": b"old"}


def test_a_replacement_is_seen_only_when_complete(tmp_path):
    (tmp_path / "file").write_text("old")
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "file").read_text() == "old"
    assert tree(tmp_path) == {"file": b"new"}


def test_paths_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below", tmp_path / "nowhere" / "file", tmp_path / "folder"):
        with pytest.raises(OutputError, match="Cannot write"):
            write_tensors(path, TENSORS, {})
    assert tree(tmp_path) == {"file": b"no folder"}


@pytest.mark.parametrize("name", [b"caf\xe9", b"caf\xe9/head"])
def test_a_path_that_is_no_utf8_is_refused_before_anything_is_written(name, tmp_path):
    target = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    for write in (lambda: check_output_folder(target, False), lambda: write_tensors(target, TENSORS, {})):
        with pytest.raises(OutputError, match=r"Cannot write '.*caf\\udce9.*', whose path is not UTF-8; choose"):
            write()
    assert not os.listdir(tmp_path)


def test_a_staged_folder_moves_file_by_file(tmp_path):
    target = tmp_path / "new" / "target"
    (target / "kept").mkdir(parents=True)
    (target / "kept" / "file").write_text("kept")
    (target / "config").write_text("old")
    with staging_folder(target) as staged:
        (staged / "kept").mkdir()
        (staged / "kept" / "more").write_text("more")
        (staged / "config").write_text("new")
        assert (target / "config").read_text() == "old"
    expected = {"target/kept/file": b"kept", "target/kept/more": b"more", "target/config": b"new"}
    assert tree(tmp_path / "new") == expected


def test_a_staged_folder_makes_its_parents(tmp_path):
    with staging_folder(tmp_path / "some" / "where") as staged:
        (staged / "file").write_text("new")
    assert tree(tmp_path) == {"some/where/file": b"new"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_staging_leaves_the_target_as_it_was(tmp_path, error):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file").write_text("old")

    def write_partly(target: Path) -> None:
        with staging_folder(target) as staged:
            (staged / "file").write_text("new")
            raise error

    for name in ("target", "new"):
        with pytest.raises(error):
            write_partly(tmp_path / name)
    assert tree(tmp_path) == {"target/file": b"old"}
    assert os.listdir(tmp_path) == ["target"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="Cannot write"), staging_folder(target) as staged:
            (staged / "config").write_text("new")
    assert tree(tmp_path) == {"file": b"no folder"}
