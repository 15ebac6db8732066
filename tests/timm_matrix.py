"""timm models under a head. Not part of the tests, since timm imports torchvision: run it where timm is installed.

    python -m tests.timm_matrix

Beside a CPU build of torch, torchvision's operators may be missing; they are declared here, never called.
"""

import contextlib
import tempfile

import torch

for operator in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):  # torchvision is whole
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")

from transformers import AutoModel, TimmWrapperConfig

from soap_hf import SOAPModelWrapper
from tests.conftest import random_projection

MODELS = {
    "vit_tiny_patch16_224": 224,
    "vit_small_patch14_reg4_dinov2": 518,
    "deit_tiny_distilled_patch16_224": 224,
    "swin_tiny_patch4_window7_224": 224,
    "convnext_atto": 224,
    "resnet18": 224,
    "hiera_tiny_224": 224,
}


@torch.no_grad()
def measure(architecture: str, size: int) -> str:
    """Layout, grid, and whether a head with its backbone comes back bit for bit."""
    backbone = AutoModel.from_config(TimmWrapperConfig(architecture=architecture, do_pooling=False)).eval()
    width = SOAPModelWrapper.from_backbone(backbone, None, image_size=size).config.hidden_size
    model = SOAPModelWrapper.from_backbone(backbone, random_projection(width), image_size=size)
    pixels = torch.randn(1, 3, size, size)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, include_backbone=True)
        loaded = AutoModel.from_pretrained(folder)
        same = torch.equal(loaded(pixels).last_hidden_state, model(pixels).last_hidden_state)
    return f"{model.layouts[-1]}, tokens {tuple(model.patch_tokens(pixels).shape)}, comes back: {same}"


if __name__ == "__main__":
    for architecture, size in MODELS.items():
        print(f"{architecture}: {measure(architecture, size)}")
