"""Shared fixtures: tiny random backbones, small image sets, the embedded demo backbone. No test reaches a network."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TQDM_DISABLE="1")

import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModel, PreTrainedModel, ViTConfig, ViTImageProcessorPil
from transformers.utils.logging import disable_progress_bar

from soap_hf import SOAPProjection
from soap_hf.cli.app import main

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DATA = ROOT / "tests" / "data"

disable_progress_bar()
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # on a new machine it says that it takes a while
torch.set_num_threads(1)  # tests run side by side


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def vit() -> PreTrainedModel:
    """A tiny random ViT: width 32, patch 8, 32 x 32 pixels."""
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    return AutoModel.from_config(config).eval()


@pytest.fixture
def projection() -> SOAPProjection:
    """Two random directions of width 32."""
    return random_projection(32)


@pytest.fixture
def processor() -> ViTImageProcessorPil:
    """Makes 32 x 32 pixels."""
    return ViTImageProcessorPil(size={"height": 32, "width": 32})


@pytest.fixture(scope="session")
def photos() -> Path:
    """64 real photographs."""
    return EXAMPLES / "photos" / "fit"


@pytest.fixture(scope="session")
def mae_folder() -> Path:
    """A tiny real ViT-MAE: width 192, patch 8, 64 x 64 pixels."""
    return EXAMPLES / "vit-mae-tiny"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the command line in `tmp_path` and gives exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    for name in ("soap_hf", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [logging.StreamHandler(sys.stderr)])

    def call(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["soap-hf", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            main()
        return exited.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture
def refused(run, tmp_path):
    """Runs the command line and gives the one sentence with which it refuses, having written and begun nothing."""

    def call(*arguments):
        before = sorted(tmp_path.iterdir())
        status, out, err = run(*arguments)
        assert status in (1, 2)
        assert not out
        assert re.fullmatch("([A-Z].+ …\n)?Error: .+\n", err), err  # it may have said what it was about to do
        assert {path.name for path in set(tmp_path.iterdir()) - set(before)} <= {"cache", "modules"}
        return err

    return call


def random_projection(dim: int, rank: int = 2) -> SOAPProjection:
    """Random orthonormal directions with weights between 0.7 and 1."""
    basis = torch.linalg.qr(torch.randn(dim, rank)).Q
    return SOAPProjection(basis, torch.linspace(1, 0.7, rank))


def noise_image(seed: int, size: tuple[int, int] = (40, 32), mode: str = "RGB") -> Image.Image:
    """An image of seeded noise; `size` is (width, height)."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).convert(mode)


@pytest.fixture
def images() -> Dataset:
    """80 images of noise in memory."""
    return Dataset.from_dict({"image": [noise_image(seed) for seed in range(80)], "label": list(range(80))})
