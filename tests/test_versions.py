"""Bounds are true and said in one sentence: of versions, of extras, and of the ways to start a process."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from soap_hf.compat import need
from soap_hf.runtime.errors import MissingExtraError, SOAPError, VersionError, refuse_older
from soap_hf.version import NEEDED
from tests.conftest import EXAMPLES, ROOT
from tests.runtime.test_travelling_heads import with_code

try:
    import tomllib
except ModuleNotFoundError:  # before Python 3.11
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BOUNDS = {
    requirement.name: next(iter(requirement.specifier)).version
    for requirement in map(Requirement, PROJECT["dependencies"])
}


def python(code: str, *paths: Path, folder: Path) -> subprocess.CompletedProcess:
    """Runs code in a process that looks into `paths` first."""
    environment = {"PYTHONPATH": ":".join(map(str, (*paths, ROOT))), "HF_HUB_OFFLINE": "1", "PATH": ""}
    environment |= {"HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def pretend(package: str, version: str, folder: Path) -> Path:
    """A folder that says that another version of a package is installed, for those who look into it first."""
    information = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return folder


def test_the_bounds_are_checked_at_import_and_tested_at_the_oldest_end():
    assert {name: bound for name, bound in BOUNDS.items() if name not in ("rich", "typer")} == NEEDED
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()[1:]
    pins = sorted(map(Requirement, lines), key=lambda pin: Version(next(iter(pin.specifier)).version), reverse=True)
    oldest = {pin.name.lower(): next(iter(pin.specifier)).version for pin in pins}
    extras = [line for name in ("fit", "eval", "figures", "onnx") for line in PROJECT["optional-dependencies"][name]]
    for wanted in map(Requirement, [*PROJECT["dependencies"], *extras]):
        if wanted.name not in ("torch", "soap-hf"):  # torch is chosen in the Makefile
            (bound,) = wanted.specifier
            pinned = Version(oldest[wanted.name.lower()])
            assert pinned.release[:2] == Version(bound.version).release[:2], wanted.name


@pytest.mark.parametrize(
    ("package", "old"),
    [("transformers", "4.57.6"), ("transformers", "5.9.0"), ("torch", "2.8.0+cpu"), ("Pillow", "10.4.0")],
)
def test_an_older_package_is_refused_in_one_sentence(package, old, tmp_path):
    done = python("import soap_hf", pretend(package, old, tmp_path / "old"), folder=tmp_path)
    needed = NEEDED[package]
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"soap_hf.runtime.errors.VersionError: SOAP needs {package} {needed} or newer, but here it is {old}; run "
        f'pip install --upgrade "{package}>={needed}".'
    )


def test_versions_are_compared_as_numbers_and_what_is_missing_is_too_old(tmp_path, monkeypatch):
    for name, found in {"package-a": "5.10.0", "package-b": "5.11.0.dev0", "package-c": "10.0"}.items():
        monkeypatch.syspath_prepend(pretend(name, found, tmp_path / name))
        refuse_older(name, "5.10")
    monkeypatch.syspath_prepend(pretend("package-d", "5.9.9", tmp_path / "d"))
    for name, found in {"package-d": "5.9.9", "package-e": "not installed"}.items():
        with pytest.raises(VersionError, match=rf"needs {name} 5.10 or newer, but here it is {found}") as refused:
            refuse_older(name, "5.10")
        assert isinstance(refused.value, (SOAPError, ImportError))


def test_a_head_alone_refuses_an_older_transformers(tmp_path):
    """Its code, pulled with trust_remote_code, says the same sentence as the package."""
    from soap_hf import SOAPModelWrapper

    head = tmp_path / "head"
    SOAPModelWrapper.from_pretrained(EXAMPLES / "soap-vit-mae-tiny").save_pretrained(head, include_backbone=True)
    code = f"""
import sys
sys.modules["soap_hf"] = None
from transformers import AutoModel
AutoModel.from_pretrained({str(with_code(head, flat=False))!r}, trust_remote_code=True)
"""
    done = python(code, pretend("transformers", "5.9.0", tmp_path / "old"), folder=tmp_path)
    assert done.returncode == 1
    assert "SOAP needs transformers 5.10 or newer, but here it is 5.9.0;" in done.stderr.splitlines()[-1]


WITHOUT_EXTRAS = """
import sys
for name in "datasets pyarrow pandas scipy sklearn matplotlib onnx".split():
    sys.modules[name] = None  # importing it fails, as where it is not installed
import torch
from soap_hf import attach_soap, fold
from soap_hf.runtime.errors import MissingExtraError
from transformers import AutoModel, pipeline
from PIL import Image
"""


def test_heads_are_applied_without_the_packages_that_fits_need(tmp_path):
    code = f"""{WITHOUT_EXTRAS}
head = {str(EXAMPLES / "soap-vit-mae-tiny")!r}
model = AutoModel.from_pretrained(head)
pixels = model.image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
print(tuple(model(pixels).last_hidden_state.shape), model.reweight(mu=1).config.ranks)
print(len(pipeline("image-feature-extraction", model=head)(Image.new("RGB", (64, 64)))[0]))
from transformers import ViTConfig, ViTForImageClassification
host = ViTForImageClassification(ViTConfig(hidden_size=192, num_hidden_layers=1, num_attention_heads=2,
                                           intermediate_size=8, image_size=64, patch_size=8)).eval()
projection = model.projections["-1"]
with attach_soap(host, projection):
    host(torch.zeros(1, 3, 64, 64))
model.save_pretrained("saved")
"""
    done = python(code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(1, 65, 192) [1]", "65"]
    assert (tmp_path / "saved" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("from soap_hf import fit_soap", "A fit"),
        ("from soap_hf import extract_features", "Writing features"),
        ("from soap_hf.evaluation import evaluate_knn", "An evaluation"),
    ],
)
def test_what_needs_an_extra_says_which(line, what, tmp_path):
    code = f"{WITHOUT_EXTRAS}\ntry:\n    {line}\nexcept MissingExtraError as error:\n    print(error)"
    done = python(code, folder=tmp_path)
    assert done.stdout == f'{what} needs datasets; run pip install "soap-hf[fit]".\n', done.stderr


def test_the_command_line_says_which_extra_it_needs(tmp_path):
    code = f"{WITHOUT_EXTRAS}\nfrom soap_hf.cli import main\nmain()"
    done = python(code, folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr == 'Error: The command line needs datasets; run pip install "soap-hf[fit]".\n'


def test_what_is_there_is_not_asked_for():
    need("torch", "Nothing", "fit")
    with pytest.raises(
        MissingExtraError, match=r'^A thing needs no_such_package; run pip install "soap-hf\[fit\]"\.$'
    ):
        need("no_such_package", "A thing", "fit")


SPAWNED = """
import multiprocessing
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from soap_hf.data.data_sets import open_dataset
from soap_hf.data.image_sample import ImageSample
from soap_hf.heads.running import head_preprocessor
from transformers import AutoModel

if __name__ == "__main__":
    multiprocessing.set_start_method("{method}")
    dataset = open_dataset("{photos}")
    sample = ImageSample(dataset, "image", 12, seed=0)
    prepare = head_preprocessor(AutoModel.from_pretrained("{head}")).of_example
    plain, spawned = (
        torch.cat([batch.values for batch in sample.batches(prepare, 4, num_workers=workers)]) for workers in (0, 2)
    )
    assert len(plain) == 12 and torch.equal(plain, spawned)
    print(multiprocessing.get_start_method(), *plain.shape)
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_that_decode_may_be_spawned(method, tmp_path):
    """As on Windows and macOS, and on Linux from Python 3.14 on."""
    script = SPAWNED.format(method=method, photos=EXAMPLES / "photos/fit", head=EXAMPLES / "soap-vit-mae-tiny")
    (tmp_path / "script.py").write_text(script)
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [method, "12", "3", "64", "64"]


def test_no_package_that_talks_http_is_named():
    """It is httpx or httpx2, by the version of huggingface_hub."""
    for path in (ROOT / "soap_hf").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) httpx", path.read_text(encoding="utf-8"), flags=re.MULTILINE), path


def test_the_probe_of_a_layout_needs_no_float64_on_the_accelerator(vit, monkeypatch):
    """MPS has none: what is measured in it is measured on the CPU."""
    from soap_hf import PatchLayout

    cpu, double, brought = torch.Tensor.cpu, torch.Tensor.double, []

    def noted(tensor):
        brought.append(cpu(tensor))
        return brought[-1]

    def guarded(tensor):
        assert any(tensor is one for one in brought), "float64 of a tensor that may lie on an accelerator"
        return double(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", noted)
    monkeypatch.setattr(torch.Tensor, "double", guarded)
    PatchLayout.detect(vit)
    assert brought
