"""Heads cross between the ends, old versions are refused, others resolve beside us, and the package packs."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from soap_hf.version import NEEDED
from tests.conftest import EXAMPLES, ROOT
from tests.runtime.test_travelling_heads import CLIENT, with_code

pytestmark = pytest.mark.slow

ENDS = ("oldest", "newest")
NEIGHBOURS = ("gradio", "timm", "peft", "sentence-transformers", "faiss-cpu")

SAVE = """
import sys
from soap_hf import SOAPModelWrapper
import soap_hf
assert "site-packages" not in soap_hf.__file__
SOAPModelWrapper.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2], include_backbone=True)
"""

USE = """
import sys
import soap_hf, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
torch.set_num_threads(1)
model = AutoModel.from_pretrained(sys.argv[1])
assert type(model) is soap_hf.SOAPModelWrapper
with torch.no_grad():
    save_file({"tokens": model(load_file(sys.argv[2])["pixels"]).last_hidden_state}, sys.argv[3])
"""


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    """What a command prints, which must succeed."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    everything = {**inherited, **quiet, **environment}
    done = subprocess.run([str(part) for part in command], cwd=folder, env=everything, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def pythons(tmp_path_factory) -> dict[str, Path]:
    """The interpreters of both ends, whose environments are made if they are not there."""
    make = ["make", "--silent", "-C", ROOT, f"PYTHON={sys.executable}", *(f".venv-{end}/.ready" for end in ENDS)]
    run(*make, folder=tmp_path_factory.mktemp("make"))
    return {end: ROOT / f".venv-{end}" / "bin" / "python" for end in ENDS}


@pytest.mark.parametrize(("saver", "user"), [ENDS, ENDS[::-1]])
def test_heads_cross_between_the_ends_bit_for_bit(saver, user, pythons, tmp_path):
    """With the package and by their code alone; both ends have one torch."""
    head, pixels = tmp_path / "head", tmp_path / "pixels.safetensors"
    save_file({"pixels": torch.randn(2, 3, 64, 64)}, pixels)
    (tmp_path / "save.py").write_text(SAVE)
    (tmp_path / "use.py").write_text(USE)
    (tmp_path / "client.py").write_text(CLIENT)
    found = {}

    def used(end: str, script: str, *more: str) -> torch.Tensor:
        output = tmp_path / f"{end} {script}.safetensors"
        with_package = {"PYTHONPATH": str(ROOT)} if script == "use.py" else {}
        run(pythons[end], script, head, pixels, output, *more, folder=tmp_path, **with_package)
        return load_file(output)["tokens"]

    run(pythons[saver], "save.py", EXAMPLES / "soap-vit-mae-tiny", head, folder=tmp_path, PYTHONPATH=str(ROOT))
    expected = used(saver, "use.py")
    found["with the package"] = used(user, "use.py")
    with_code(head, flat=False)
    found["alone"] = used(user, "client.py", "AutoModel")
    versions = {
        end: run(python, "-c", "import torch; print(torch.__version__)", folder=tmp_path)
        for end, python in pythons.items()
    }
    for way, tokens in found.items():
        if len(versions) == 1:
            assert torch.equal(tokens, expected), way
        else:
            torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-6)


def test_the_demo_prints_the_same_at_both_ends(pythons, tmp_path):
    printed = {}
    for end, python in pythons.items():
        (tmp_path / end).mkdir()
        text = run(python, EXAMPLES / "quickstart.py", folder=tmp_path / end, PYTHONPATH=str(ROOT))
        printed[end] = re.findall(r"(?:before|after) +[\d.]+%", text)
    assert printed["oldest"] == printed["newest"]
    assert len(printed["newest"]) >= 2


def test_a_head_alone_on_transformers_of_before_says_what_it_needs(tmp_path):
    """In the real packages, rather than their names."""
    from soap_hf import SOAPModelWrapper

    head = tmp_path / "head"
    SOAPModelWrapper.from_pretrained(EXAMPLES / "soap-vit-mae-tiny").save_pretrained(head, include_backbone=True)
    with_code(head, flat=False)
    for version in ("4.57.6", "5.9.0"):
        old = tmp_path / version
        wanted = [f"transformers=={version}", "numpy", "packaging"]
        run(sys.executable, "-m", "pip", "install", "--quiet", "--target", old, *wanted, folder=tmp_path)
        for code in (
            "import soap_hf",
            f"import sys; sys.modules['soap_hf'] = None; from transformers import AutoModel; "
            f"AutoModel.from_pretrained({str(head)!r}, trust_remote_code=True)",
        ):
            environment = {**os.environ, "PYTHONPATH": f"{old}:{ROOT}", "HF_HOME": str(tmp_path / f"home {version}")}
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 1
            wanted_words = f"SOAP needs transformers {NEEDED['transformers']} or newer, but here it is {version}; run "
            assert wanted_words in done.stderr.splitlines()[-1], done.stderr[-2000:]


def test_it_resolves_beside_what_people_have(tmp_path):
    """Asks the resolver of pip, with nothing installed, and holds torch to the one that is here."""
    run(sys.executable, "-m", "venv", "empty", folder=tmp_path)
    report, here = tmp_path / "report.json", f"torch=={torch.__version__.partition('+')[0]}"
    python = tmp_path / "empty" / "bin" / "python"
    wanted = [f"{ROOT}[explore]", here, *NEIGHBOURS]
    run(python, "-m", "pip", "install", "--dry-run", "--quiet", "--report", report, *wanted, folder=tmp_path)
    chosen = {item["metadata"]["name"].lower() for item in json.loads(report.read_text())["install"]}
    assert {"soap-hf", "transformers", "datasets", *NEIGHBOURS} <= chosen


def test_the_package_packs_and_installs_from_its_source(tmp_path):
    """`build` makes the wheel from the source archive, and `pip install git+…` one from a repository."""
    clone = tmp_path / "clone"
    ignored = shutil.ignore_patterns(
        ".venv*", ".git", "dist", "build", "__pycache__", ".*_cache", ".hypothesis", "demo-head"
    )
    shutil.copytree(ROOT, clone, ignore=ignored)
    run("make", "--silent", "dist", f"PYTHON={sys.executable}", folder=clone)  # with twine check --strict
    wheel, archive = sorted((clone / "dist").iterdir())
    assert (wheel.suffix, archive.suffix) == (".whl", ".gz")
    with tarfile.open(archive) as file:
        names = {Path(*Path(name).parts[1:]).as_posix() for name in file.getnames()}
    assert {"soap_hf/__init__.py", "tests/test_environments.py", "LICENSE", "README.md"} <= names
    shutil.rmtree(clone / ".venv-dist")
    shutil.rmtree(clone / "dist")
    as_me = ("-c", "user.name=me", "-c", "user.email=me@example.org")
    for command in (("init", "-q"), ("add", "-A"), (*as_me, "commit", "-qm", "all")):
        run("git", *command, folder=clone)
    address = f"git+file://{clone}"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "there")
    run(*pip, address, folder=tmp_path)
    found = run(
        sys.executable,
        "-c",
        "import soap_hf; print(soap_hf.__file__)",
        folder=tmp_path,
        PYTHONPATH=str(tmp_path / "there"),
    )
    assert Path(found.strip()) == tmp_path / "there" / "soap_hf" / "__init__.py"
