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

from soap_hf import SOAPModelWrapper, attach_soap
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


@torch.no_grad()
def measure_attached(architecture: str, size: int) -> str:
    """Whether a head attached to timm's own model cleans what its wrapper cleans, and leaves no trace."""
    import timm  # not there where the other tests run

    live = timm.create_model(architecture, num_classes=5).eval()
    backbone = AutoModel.from_config(TimmWrapperConfig(architecture=architecture, do_pooling=False)).eval()
    backbone.timm_model.load_state_dict(live.state_dict(), strict=False)
    wrapper = SOAPModelWrapper.from_backbone(backbone, random_projection(live.num_features), image_size=size)
    pixels = torch.randn(1, 3, size, size)
    before = live(pixels)
    with attach_soap(live, wrapper, inputs=pixels):
        difference = (live.forward_features(pixels) - wrapper(pixels).last_hidden_state).abs().max()
    restored = torch.equal(live(pixels), before)
    return f"attached, its tokens differ by {difference:.0e} from the wrapper's; as before when detached: {restored}"


if __name__ == "__main__":
    for architecture, size in MODELS.items():
        print(f"{architecture}: {measure(architecture, size)}")
        if "vit" in architecture or "deit" in architecture:
            print(f"{architecture}: {measure_attached(architecture, size)}")
