"""Shared fixtures: tiny random backbones, small image sets, the embedded demo backbone. No test reaches a network."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TQDM_DISABLE="1")

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModel, PreTrainedModel, ViTConfig, ViTImageProcessorPil
from transformers.utils import logging

from soap_hf import SOAPProjection

EXAMPLES = Path(__file__).parents[1] / "examples"

logging.disable_progress_bar()
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


@pytest.fixture
def photos() -> Path:
    """64 real photographs."""
    return EXAMPLES / "photos" / "fit"


@pytest.fixture
def mae_folder() -> Path:
    """A tiny real ViT-MAE: width 192, patch 8, 64 x 64 pixels."""
    return EXAMPLES / "vit-mae-tiny"


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
