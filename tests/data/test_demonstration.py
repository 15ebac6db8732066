"""The notebooks find the demo's files from anywhere, or say how to."""

import shutil

import pytest

from soap_hf.data import demonstration
from soap_hf.data.demonstration import examples_folder
from soap_hf.runtime.errors import DataError
from tests.conftest import EXAMPLES


@pytest.fixture
def clone(tmp_path):
    """A clone in which the demo lies."""
    (tmp_path / "clone/examples").mkdir(parents=True)
    shutil.copytree(EXAMPLES / "vit-mae-tiny", tmp_path / "clone/examples/vit-mae-tiny")
    return tmp_path / "clone"


@pytest.mark.parametrize("place", [".", "examples", "examples/vit-mae-tiny", "docs/deep"])
def test_the_clone_that_one_works_in_goes_first(clone, place, monkeypatch):
    (clone / place).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(clone / place)
    assert examples_folder() == clone / "examples"


def test_elsewhere_it_is_what_lies_beside_the_package_or_what_is_named(clone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert examples_folder() == EXAMPLES
    monkeypatch.setenv("SOAP_HF_EXAMPLES", str(clone / "examples"))
    assert examples_folder() == clone / "examples"
    monkeypatch.setenv("SOAP_HF_EXAMPLES", str(tmp_path))
    with pytest.raises(DataError, match="SOAP_HF_EXAMPLES"):
        examples_folder()


def test_without_a_clone_the_way_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(demonstration, "__file__", str(tmp_path / "site-packages/soap_hf/data/demonstration.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="set SOAP_HF_EXAMPLES to that folder, or take a backbone and photographs of"):
        examples_folder()
