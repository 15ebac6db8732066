"""The patch tokens are found in every supported backbone, and nothing else is touched."""

import pytest
import torch
from transformers import (
    AutoModel,
    BeitConfig,
    CLIPVisionConfig,
    ConvNextV2Config,
    Data2VecVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    IJepaConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
    ViTMAEConfig,
)

from soap_hf import PatchLayout, SOAPModelWrapper
from soap_hf.runtime.errors import BackboneError, HeadError, LayoutError
from tests.conftest import random_projection

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
WITH_MLP = {**SIZES, "intermediate_size": 32}
REGISTERS = {"num_register_tokens": 4}
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 64}

BACKBONES = {
    "vit": (ViTConfig(**WITH_MLP), PatchLayout(prefix=1, stride=8)),
    "vit_mae": (ViTMAEConfig(**WITH_MLP), PatchLayout(prefix=1, stride=8)),
    "dinov2": (Dinov2Config(**SIZES), PatchLayout(prefix=1, stride=8)),
    "dinov2_with_registers": (Dinov2WithRegistersConfig(**SIZES, **REGISTERS), PatchLayout(prefix=5, stride=8)),
    "dinov3_vit": (DINOv3ViTConfig(**WITH_MLP, **REGISTERS), PatchLayout(prefix=5, stride=8)),
    "ijepa": (IJepaConfig(**WITH_MLP), PatchLayout(stride=8)),
    "beit": (BeitConfig(**WITH_MLP), PatchLayout(prefix=1, stride=8)),
    "data2vec-vision": (Data2VecVisionConfig(**WITH_MLP), PatchLayout(prefix=1, stride=8)),
    "deit": (DeiTConfig(**WITH_MLP), PatchLayout(prefix=2, stride=8)),
    "clip_vision_model": (CLIPVisionConfig(**WITH_MLP), PatchLayout(prefix=1, stride=8)),
    "siglip_vision_model": (SiglipVisionConfig(**WITH_MLP), PatchLayout(stride=8)),
    "swin": (SwinConfig(**SWIN), PatchLayout(stride=8)),
    "convnextv2": (ConvNextV2Config(**CONVNEXT), PatchLayout(order="channels_first")),
}


@pytest.fixture(params=BACKBONES)
def backbone(request):
    """Each backbone type, tiny and random, with position embeddings that differ from place to place."""
    config, layout = BACKBONES[request.param]
    model = AutoModel.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "position_embedding" in name or "cls_token" in name:
            torch.nn.init.normal_(parameter)
    return model, layout


def test_layout_is_found(backbone):
    model, layout = backbone
    assert PatchLayout.detect(model) == layout


def test_patches_are_in_raster_order(backbone):
    """Changing one corner of the image moves the patch of that corner most, and a map keeps rows and columns apart."""
    model, _ = backbone
    wrapper = SOAPModelWrapper.from_backbone(model, None)
    size = 64
    pixels = torch.randn(1, 3, size, 2 * size)
    poked = pixels.clone()
    poked[:, :, -8:, :8] += 50  # bottom left
    moved = (wrapper.patch_tokens(poked) - wrapper.patch_tokens(pixels)).norm(dim=-1)[0]
    assert moved.shape[1] == 2 * moved.shape[0]
    assert divmod(int(moved.argmax()), moved.shape[1]) == (moved.shape[0] - 1, 0)


def test_only_patch_tokens_change_and_exactly_by_the_dense_projector(backbone):
    model, layout = backbone
    dim = SOAPModelWrapper.from_backbone(model, None).config.hidden_size
    projection = random_projection(dim)
    wrapper = SOAPModelWrapper.from_backbone(model, projection)
    pixels = torch.randn(2, 3, 64, 64)
    outputs = wrapper(pixels, output_raw=True)
    raw, clean = outputs.raw_last_hidden_state, outputs.last_hidden_state
    size = (64, 64)
    expected = layout.patches(raw, size) @ projection.matrix().T
    torch.testing.assert_close(layout.patches(clean, size), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(clean[:, : layout.prefix], raw[:, : layout.prefix])
    with wrapper.disabled():
        assert torch.equal(wrapper(pixels).last_hidden_state, raw)


def test_off_size_images_work(backbone):
    model, _ = backbone
    wrapper = SOAPModelWrapper.from_backbone(model, None)
    for height, width in ((64, 64), (64, 96), (70, 78)):
        grid = wrapper.patch_tokens(torch.randn(1, 3, height, width)).shape[1:3]
        assert grid in {(height // 8, width // 8), (-(-height // 8), -(-width // 8))}


def test_detecting_changes_nothing(backbone):
    model, _ = backbone
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    PatchLayout.detect(model)
    assert all(module.training for module in model.modules())
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_hidden_layers_have_their_own_stride():
    model = AutoModel.from_config(BACKBONES["swin"][0]).eval()
    assert [PatchLayout.detect(model, layer=layer).stride for layer in (0, 1)] == [4, 8]


def test_every_field_can_be_overridden(vit):
    assert PatchLayout.detect(vit, prefix=9, suffix=4, stride=16) == PatchLayout(prefix=9, suffix=4, stride=16)


def test_tokens_that_form_no_grid_are_refused_with_the_way_out(vit):
    with pytest.raises(
        LayoutError, match=r"17 tokens .* without 4 before .* 13 patches form no grid: pass a PatchLayout"
    ):
        PatchLayout.detect(vit, prefix=4)


def test_layer_that_does_not_exist_is_refused(vit):
    with pytest.raises(BackboneError, match="hidden states 0 to 2"):
        PatchLayout.detect(vit, layer=7)


@pytest.mark.parametrize(
    "values", [{"order": "packed?"}, {"prefix": -1}, {"stride": 0}, {"stride": 1.5}, {"depth": 3}]
)
def test_impossible_layouts_of_a_config_are_head_errors(values):
    with pytest.raises(HeadError):
        PatchLayout.from_dict(values)


def test_tokens_of_another_shape_are_refused():
    layout = PatchLayout(prefix=1, stride=8)
    with pytest.raises(LayoutError, match="does not fit"):
        layout.patches(torch.zeros(1, 4, 4, 8), (32, 32))
    with pytest.raises(LayoutError, match="no grid of stride 8"):
        layout.patches(torch.zeros(1, 14, 8), (32, 32))
    with pytest.raises(LayoutError, match="leaves no patch"):
        layout.patches(torch.zeros(1, 1, 8), (32, 32))
    with pytest.raises(LayoutError, match="image size"):
        layout.patches(torch.zeros(1, 17, 8))
