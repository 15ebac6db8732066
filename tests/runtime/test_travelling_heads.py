"""A head runs by the files that travel with it, without this package; and so do heads of earlier versions."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModel

from soap_hf import SOAPBackbone, SOAPModelWrapper
from soap_hf.heads.hub import AUTO_MAP, CODE_FOLDER, code_files
from tests.conftest import DATA, EXAMPLES, random_projection
from tests.tiny_backbones import COMPOSITES, TINY_BACKBONES

OLD = DATA / "heads"

CLIENT = """
import sys

BLOCKED = "soap_hf accelerate datasets matplotlib pandas pyarrow rich scipy sklearn typer".split()
for name in BLOCKED:
    sys.modules[name] = None  # importing it fails, as where it is not installed
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

torch.set_num_threads(1)
head, tensors, output, entry = sys.argv[1:]
if entry == "AutoModel":
    model = AutoModel.from_pretrained(head, trust_remote_code=True)
else:
    model = get_class_from_dynamic_module(entry, head).from_pretrained(head)
assert type(model).__module__.startswith("transformers_modules"), type(model)
with torch.no_grad():
    outputs = model(load_file(tensors)["pixels"])
maps = getattr(outputs, "feature_maps", None)
save_file({"tokens": (outputs.last_hidden_state if maps is None else maps[-1]).contiguous()}, output)
for method in (model.save_pretrained, model.push_to_hub, model.reweight, type(model).from_backbone):
    if "0.1.0" not in head:
        try:
            method("somewhere")
        except Exception as error:
            assert "run pip install soap-hf" in str(error), error
        else:
            raise AssertionError(method)
"""


def travel(folder: Path, pixels: torch.Tensor, tmp_path: Path, entry: str = "AutoModel") -> torch.Tensor:
    """The tokens of a head in a process that has its code alone."""
    from safetensors.torch import save_file

    save_file({"pixels": pixels}, tmp_path / "pixels.safetensors")
    (tmp_path / "client.py").write_text(CLIENT)
    arguments = [
        tmp_path / "client.py",
        folder,
        tmp_path / "pixels.safetensors",
        tmp_path / "tokens.safetensors",
        entry,
    ]
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path / "tokens.safetensors")["tokens"]


def with_code(folder: Path, flat: bool) -> Path:
    """Puts the code beside a head, as a push does, or flat."""
    place = folder if flat else folder / CODE_FOLDER
    place.mkdir(exist_ok=True)
    for path in code_files():
        shutil.copyfile(path, place / path.name)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {name: entry.removeprefix("code/") if flat else entry for name, entry in AUTO_MAP.items()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def demo(folder: Path) -> Path:
    """The head of the examples, with its backbone inside."""
    SOAPModelWrapper.from_pretrained(EXAMPLES / "soap-vit-mae-tiny").save_pretrained(folder, include_backbone=True)
    return folder


def clip_tower(folder: Path) -> Path:
    """A head on the vision tower of a tiny CLIP, which lies beside it whole."""
    COMPOSITES["clip"].build().save_pretrained(folder.parent / "clip")
    head = SOAPModelWrapper.from_backbone(str(folder.parent / "clip"), None)
    return over_random_directions(head, folder)


def swin_map(folder: Path) -> Path:
    """A head on a backbone that returns another number of tokens than a ViT, and reduces its maps."""
    TINY_BACKBONES["swin"].build().save_pretrained(folder.parent / "swin")
    return over_random_directions(SOAPModelWrapper.from_backbone(str(folder.parent / "swin"), None), folder)


def over_random_directions(head: SOAPModelWrapper, folder: Path) -> Path:
    """The same backbone under a head that removes two random directions, saved."""
    layers = {-1: random_projection(head.config.hidden_size)}
    name = head.config.backbone_name_or_path
    SOAPModelWrapper.from_backbone(head.backbone, layers, name_or_path=name).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("make", "side"), [(demo, 64), (clip_tower, 32), (swin_map, 32)])
def test_a_head_runs_by_its_own_code(make, side, flat, tmp_path):
    folder = with_code(make(tmp_path / "head"), flat)
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder)(pixels).last_hidden_state
    assert torch.equal(travel(folder, pixels, tmp_path), expected)


def test_a_backbone_of_feature_maps_runs_by_its_own_code(tmp_path):
    folder = with_code(demo(tmp_path / "head"), flat=False)
    pixels = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        expected = SOAPBackbone.from_pretrained(folder)(pixels).feature_maps[-1]
    assert torch.equal(travel(folder, pixels, tmp_path, AUTO_MAP["AutoBackbone"]), expected)


@pytest.mark.parametrize("name", ["saved_by_0.1.0", "pushed_by_0.1.0"])
def test_heads_of_version_0_1_0_load_with_the_package(name):
    known = load_file(OLD / "expected.safetensors")
    model = AutoModel.from_pretrained(OLD / name)
    assert type(model) is SOAPModelWrapper
    with torch.no_grad():
        torch.testing.assert_close(model(known["pixels"]).last_hidden_state, known["tokens"], rtol=1e-5, atol=1e-5)
    assert model.reweight(mu=1).config.ranks == [1]


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="the code that 0.1.0 pushed needs transformers 5.20"
)
def test_a_head_that_0_1_0_pushed_runs_by_its_own_code(tmp_path):
    known = load_file(OLD / "expected.safetensors")
    folder = shutil.copytree(OLD / "pushed_by_0.1.0", tmp_path / "pushed_by_0.1.0")
    tokens = travel(folder, known["pixels"], tmp_path)
    torch.testing.assert_close(tokens, known["tokens"], rtol=1e-5, atol=1e-5)
