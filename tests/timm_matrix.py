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

from PIL import Image
from transformers import AutoModel, TimmWrapperConfig

from soap_hf import SOAPModelWrapper, attach_soap
from soap_hf.data.preprocessing import ImagePreprocessor, timm_processor
from soap_hf.layout.backbone import OpenedBackbone
from tests.conftest import EXAMPLES, random_projection

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


@torch.no_grad()
def measure_plain(name: str, module: torch.nn.Module, size: int) -> str:
    """Where a live module's tokens are found, and whether a head on it comes back bit for bit and attaches."""
    width = SOAPModelWrapper.from_backbone(module, None, image_size=size).config.hidden_size
    model = SOAPModelWrapper.from_backbone(module, random_projection(width), image_size=size)
    pixels = torch.randn(1, 3, size, size)
    expected = model(pixels).last_hidden_state
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = SOAPModelWrapper.from_pretrained(folder, backbone=module)
        same = torch.equal(loaded(pixels).last_hidden_state, expected)
        with attach_soap(module, folder, inputs=pixels):
            bare = SOAPModelWrapper.from_backbone(module, None, image_size=size)
            difference = float((bare(pixels).last_hidden_state - expected).abs().max())
    found = str(model.backbone.tokens) or "its output"
    return (
        f"live, tokens at {found}, {model.layouts[-1]}, comes back: {same}, attached it differs by {difference:.0e}; "
        f"depth {model.backbone.config.num_hidden_layers}, patch {model.backbone.config.patch_size}"
    )


@torch.no_grad()
def measure_pixels(architecture: str) -> str:
    """How far the pixels made by timm's settings are from those of timm's own transform."""
    import timm

    settings = timm.create_model(architecture).pretrained_cfg
    photo = Image.open(EXAMPLES / "photos/heldout/04c1bde5affb7b5b.jpg").convert("RGB")
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(settings))(photo)
    ours = ImagePreprocessor(timm_processor(settings))(photo)
    return f"pixels of {tuple(ours.shape)} differ from timm's by {float((ours - theirs).abs().mean()):.1e} on average"


def reload_by_name(architecture: str) -> str:
    """Whether a head fitted by timm's name loads again from it: here without pretrained weights, so other ones."""
    name, arguments = f"timm:{architecture}", {"pretrained": False}
    opened = OpenedBackbone.load(name, arguments=arguments)
    model = SOAPModelWrapper.from_backbone(opened, random_projection(opened.model.module.num_features))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModel.from_pretrained(folder)
    return f"{name}: loaded again as {type(loaded.backbone.module).__name__}"


if __name__ == "__main__":
    for architecture, size in MODELS.items():
        print(f"{architecture}: {measure(architecture, size)}")
        if "vit" in architecture or "deit" in architecture:
            print(f"{architecture}: {measure_attached(architecture, size)}")
    import timm  # not there where the other tests run
    import torchvision

    for architecture, size in {**MODELS, "vit_base_patch16_rope_reg1_gap_256": 256}.items():
        print(f"{architecture}: {measure_plain(architecture, timm.create_model(architecture).eval(), size)}")
        print(f"{architecture}: {measure_pixels(architecture)}")
    print(reload_by_name("vit_tiny_patch16_224"))
    for architecture in ("vit_b_16", "vit_b_32"):
        module = torchvision.models.get_model(architecture, weights=None).eval()
        print(f"torchvision {architecture}: {measure_plain(architecture, module, 224)}")
