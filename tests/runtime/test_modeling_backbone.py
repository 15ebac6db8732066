"""A head serves as the backbone of a dense head, with every stage clean."""

import pytest
import torch
from transformers import (
    AutoBackbone,
    AutoModel,
    Mask2FormerConfig,
    Mask2FormerModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from soap_hf import PatchLayout, SOAPBackbone, SOAPModelWrapper
from soap_hf.runtime.errors import HeadError
from tests.conftest import random_projection


@pytest.fixture
def head(vit, tmp_path):
    """A head on three layers, beside its backbone."""
    vit.save_pretrained(tmp_path / "vit")
    vit.config.name_or_path = str(tmp_path / "vit")
    projections = {0: None, 1: random_projection(32), -1: random_projection(32, 3)}
    SOAPModelWrapper.from_backbone(vit, projections).save_pretrained(tmp_path / "head")
    return tmp_path / "head"


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 32, 48)


def test_feature_maps_are_the_clean_patches_of_each_layer(head, pixels):
    backbone, model = SOAPBackbone.from_pretrained(head), AutoModel.from_pretrained(head)
    assert backbone.out_features == ["layer0", "layer1", "last"]
    maps = backbone(pixels, output_raw=True)
    for layer, clean, raw in zip((0, 1, -1), maps.feature_maps, maps.raw_feature_maps, strict=True):
        assert clean.shape == (2, 32, 4, 6)
        assert torch.equal(clean.movedim(1, -1), model.patch_tokens(pixels, layer))
        assert torch.equal(raw.movedim(1, -1), model.patch_tokens(pixels, layer, raw=True))
    assert torch.equal(backbone(pixels, return_dict=False)[0][1], maps.feature_maps[1])


def test_stages_can_be_chosen_and_are_remembered(head, pixels, tmp_path):
    backbone = SOAPBackbone.from_pretrained(head)
    backbone.out_indices = (1, 2)
    assert (backbone.out_features, backbone.channels) == (["layer1", "last"], [32, 32])
    assert len(backbone(pixels).feature_maps) == 2
    backbone.save_pretrained(tmp_path / "two")
    again = SOAPBackbone.from_pretrained(tmp_path / "two")
    assert again.out_features == ["layer1", "last"]
    assert torch.equal(again(pixels).feature_maps[0], backbone(pixels).feature_maps[0])


def test_stages_can_be_chosen_as_it_is_loaded(head, pixels):
    everything = SOAPBackbone.from_pretrained(head)(pixels).feature_maps
    for choice in ({"out_features": ["layer0", "last"]}, {"out_indices": [0, 2]}, {"out_indices": (0, -1)}):
        backbone = SOAPBackbone.from_pretrained(head, **choice)
        assert backbone.out_features == ["layer0", "last"]
        maps = backbone(pixels).feature_maps
        assert len(maps) == 2
        assert torch.equal(maps[0], everything[0])
        assert torch.equal(maps[1], everything[2])
    with_config = SOAPBackbone.from_pretrained(head, config=backbone.config, out_indices=[1])
    assert (with_config.out_features, backbone.out_features) == (["layer1"], ["layer0", "last"])


@pytest.mark.parametrize(
    "choice", [{"out_features": ["layer7"]}, {"out_features": ["last", "layer0"]}, {"out_indices": [7]}]
)
def test_a_stage_that_is_not_there_is_refused_before_the_backbone_is_loaded(head, choice, monkeypatch):
    monkeypatch.setattr(SOAPModelWrapper, "_find_backbone", None)
    with pytest.raises(HeadError, match=r"The stages of the head .* are layer0, layer1, last, in this order; choose"):
        SOAPBackbone.from_pretrained(head, **choice)


def test_autobackbone_knows_it(head, pixels):
    built = AutoBackbone.from_config(AutoModel.from_pretrained(head).config)
    assert isinstance(built, SOAPBackbone)
    assert built(pixels).feature_maps[-1].shape == (2, 32, 4, 6)


def test_hidden_states_are_the_backbones_own_number(head, vit, pixels):
    assert len(SOAPBackbone.from_pretrained(head)(pixels, output_hidden_states=True).hidden_states) == 3
    vit(pixels[..., :32], output_hidden_states=True)  # its layers are hooked before the head comes
    shared = SOAPBackbone.from_pretrained(head, backbone=vit)
    assert len(shared(pixels, output_hidden_states=True).hidden_states) == 3


def test_maps_of_a_convolutional_backbone_keep_their_strides(pixels):
    from tests.tiny_backbones import TINY_BACKBONES

    model = TINY_BACKBONES["convnextv2"].build()
    widths = model.config.hidden_sizes
    layers = range(1, len(widths) + 1)
    backbone = SOAPBackbone.from_backbone(model, {layer: random_projection(widths[layer - 1]) for layer in layers})
    maps = backbone(torch.randn(1, 3, 128, 128)).feature_maps
    assert [stage.shape[1] for stage in maps] == backbone.channels == list(widths)
    assert all(layout == PatchLayout(order="channels_first") for layout in backbone.layouts.values())


def test_a_dense_head_trains_on_clean_maps_and_survives_saving(head, tmp_path):
    """UperNet learns to tell dark from bright on a frozen clean backbone, and comes back as it was."""
    torch.manual_seed(0)
    backbone = SOAPBackbone.from_pretrained(head)
    config = UperNetConfig(
        backbone_config=backbone.config, hidden_size=16, num_labels=2, use_auxiliary_head=False, pool_scales=[1, 2]
    )
    model = UperNetForSemanticSegmentation(config)
    model.backbone = backbone.requires_grad_(False)
    frozen = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    labels = (torch.arange(48) >= 24).long().expand(4, 32, 48)
    pixels = torch.randn(4, 3, 32, 48) + 3.0 * labels[:, None]
    optimizer = torch.optim.Adam(model.decode_head.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = model.train()(pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in backbone.state_dict().items())
    model.eval().save_pretrained(tmp_path / "upernet")
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "upernet")
    assert isinstance(again.backbone, SOAPBackbone)
    saved = again.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(again(pixels).logits, model(pixels).logits)


def test_mask2former_runs_on_clean_maps_and_comes_back(vit, tmp_path):
    heads = {layer: random_projection(32) for layer in (0, 1, 2, -1)}
    backbone = SOAPBackbone.from_backbone(vit, heads)
    config = Mask2FormerConfig(
        backbone_config=backbone.config, feature_size=32, mask_feature_size=32, hidden_dim=32, num_queries=4,
        encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32,
    )  # fmt: skip
    model = Mask2FormerModel(config).eval()
    model.pixel_level_module.encoder = backbone
    pixels = torch.randn(1, 3, 32, 48)
    outputs = model(pixels, output_hidden_states=True)
    clean = backbone(pixels).feature_maps[-1]
    assert torch.equal(outputs.encoder_last_hidden_state, clean)
    model.save_pretrained(tmp_path)
    again = Mask2FormerModel.from_pretrained(tmp_path)
    assert torch.equal(again(pixels, output_hidden_states=True).encoder_last_hidden_state, clean)
