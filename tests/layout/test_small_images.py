"""A backbone is looked at with a small image where that tells as much as one of its native size, else with that."""

import copy

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForMaskedImageModeling, ViTModel

from soap_hf import PatchLayout, SOAPModelWrapper, attach_soap, fold, unfold
from soap_hf.layout.probing import PATCHES_PER_SIDE
from soap_hf.runtime.errors import BackboneError
from tests.conftest import random_projection
from tests.tiny_backbones import TINY_BACKBONES, VIT, build

NATIVE = (160, 160)  # 20 x 20 patches of 8 pixels
SMALL = (8 * PATCHES_PER_SIDE, 8 * PATCHES_PER_SIDE)


def large(name):
    """A tiny backbone of a type, but for images five times as large as in the table."""
    tiny = TINY_BACKBONES[name]
    return build(tiny.config_class, copy.deepcopy(tiny.config) | {"image_size": NATIVE[0]}, NATIVE)


@pytest.fixture
def seen(monkeypatch):
    """The shapes `(number, height, width)` of the pixels that patch embeddings were given, in turn."""
    shapes, forward = [], nn.Conv2d.forward

    def noting(self, pixels):
        if pixels.shape[1] == 3:
            shapes.append((len(pixels), *pixels.shape[-2:]))
        return forward(self, pixels)

    monkeypatch.setattr(nn.Conv2d, "forward", noting)
    return shapes


@pytest.fixture
def decoder():
    """A model that reads the patch tokens of its ViT, and takes images of any size."""
    return ViTForMaskedImageModeling(ViTConfig(**VIT | {"image_size": NATIVE[0]}, encoder_stride=8)).eval()


class OfOneSize(nn.Module):
    """A model that reads patch tokens on a grid of its own size alone."""

    def __init__(self, grid):
        super().__init__()
        self.encoder = ViTModel(ViTConfig(**VIT | {"image_size": NATIVE[0]})).eval()
        self.readout, self.grid = nn.Linear(32, 2), grid

    def forward(self, pixels):
        tokens = self.encoder(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
        return self.readout(tokens.unflatten(1, self.grid)).mean((1, 2))


@pytest.mark.parametrize("name", ["vit", "vit_mae", "beit", "dinov2_with_registers", "clip_vision_model", "pixtral"])
def test_a_small_image_tells_the_layout_that_a_native_one_does(name, seen):
    model = large(name)
    seen.clear()
    small = PatchLayout.detect(model)
    assert {shape[1:] for shape in seen} == {SMALL}
    assert small == PatchLayout.detect(model, image_size=NATIVE)


@pytest.mark.parametrize("name", ["aimv2_vision_model", "vitdet", "swin"])
def test_what_takes_no_small_image_or_does_not_show_in_one_is_looked_at_in_its_own_size(name, seen):
    model = large(name)
    seen.clear()
    found = PatchLayout.detect(model)
    assert seen[-1][1:] == NATIVE
    assert found == PatchLayout.detect(model, image_size=NATIVE)


def test_a_head_is_put_on_a_backbone_by_a_small_image_unless_a_size_is_given(vit, seen):
    model = ViTModel(ViTConfig(**VIT | {"image_size": NATIVE[0]}))
    assert SOAPModelWrapper.from_backbone(model, None).layouts[-1] == PatchLayout(prefix=1, stride=8)
    assert seen == [(5, *SMALL)]
    SOAPModelWrapper.from_backbone(model, None, image_size=96)
    assert seen[1:] == [(5, 96, 96)]
    SOAPModelWrapper.from_backbone(vit, None)  # its own size is smaller yet
    assert seen[2:] == [(5, 32, 32)]


def test_attaching_and_folding_take_small_images_and_of_a_head_one_at_a_time(decoder, seen):
    head = SOAPModelWrapper.from_backbone(decoder.vit, random_projection(32))
    seen.clear()
    attach_soap(decoder, head).detach()
    folding = fold(decoder, head)
    assert set(seen) == {(1, *SMALL)}
    unfold(decoder, folding)
    attach_soap(decoder, random_projection(32)).detach()  # which says nothing of where patches are
    assert set(seen) == {(1, *SMALL), (5, *SMALL)}
    seen.clear()
    attach_soap(decoder, head, inputs=torch.zeros(2, 3, *NATIVE)).detach()
    assert {shape[1:] for shape in seen} == {NATIVE}


def test_a_model_whose_rest_takes_one_size_is_checked_at_that(seen):
    model = OfOneSize((20, 20))
    pixels, projection = torch.randn(1, 3, *NATIVE), random_projection(32)
    with torch.no_grad():
        tokens = model.encoder(pixels).last_hidden_state[:, 1:]
        with attach_soap(model, projection):
            torch.testing.assert_close(model(pixels), model.readout(projection(tokens)).mean(1))
    assert {shape[1:] for shape in seen} == {SMALL, NATIVE}
    with pytest.raises(BackboneError, match=r"cannot be called with one image of 160 x 160 .*; pass inputs="):
        attach_soap(OfOneSize((7, 7)), projection)
