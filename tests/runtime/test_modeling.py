"""The wrapper cleans patch tokens and nothing else, whatever the backbone, dtype or way of running it."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import AutoModel, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from soap_hf import PatchLayout, SOAPModelWrapper, SOAPProjection, SOAPStatistics, fit_soap
from soap_hf.runtime.errors import BackboneError, HeadError, SOAPError
from tests.conftest import random_projection
from tests.tiny_backbones import TINY_BACKBONES

MAE = ViTMAEConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
    decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=1, decoder_intermediate_size=8,
)  # fmt: skip


@pytest.fixture
def mae():
    """A tiny random ViT-MAE that masks, as it comes; its position embeddings tell places apart."""
    model = ViTMAEModel(MAE).eval()
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    return model


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 32, 32)


@pytest.fixture
def statistics():
    """Statistics with two directions to remove, of width 32 on a 4 x 4 grid."""
    real, synthetic = torch.randn(2, 200, 4, 4, 32)
    place = torch.linspace(-4, 4, 4)
    for tokens in (real, synthetic):
        tokens[..., 3] += place
        tokens[..., 5] += 0.8 * place[:, None]
    return SOAPStatistics.from_tokens(real, synthetic)


def test_the_live_model_is_shared_and_stays_as_it_was(vit, projection, pixels):
    before, config, hooks = vit(pixels).last_hidden_state, vit.config.to_dict(), list(vit._forward_hooks)
    wrapper = SOAPModelWrapper.from_backbone(vit, projection)
    wrapper(pixels, output_raw=True)
    assert wrapper.backbone is vit
    assert torch.equal(vit(pixels).last_hidden_state, before)
    assert vit.config.to_dict() == config
    assert list(vit._forward_hooks) == hooks


def test_mae_gives_every_patch_in_raster_order_and_still_masks_outside(mae, pixels):
    wrapper = SOAPModelWrapper.from_backbone(mae, None)
    assert wrapper.patch_tokens(pixels).shape == (2, 4, 4, 32)
    assert torch.equal(wrapper(pixels).last_hidden_state, wrapper(pixels).last_hidden_state)
    assert mae.config.mask_ratio == 0.75
    assert mae(pixels).last_hidden_state.shape[1] == 1 + 16 // 4
    shared = {parameter.data_ptr() for parameter in mae.parameters()}
    assert {parameter.data_ptr() for parameter in wrapper.backbone.parameters()} == shared


def test_task_models_give_their_base_model(vit, pixels):
    task = ViTForImageClassification(vit.config).eval()
    wrapper = SOAPModelWrapper.from_backbone(task, None)
    assert wrapper.backbone is task.vit
    pretraining = ViTMAEForPreTraining(MAE).eval()
    wrapper = SOAPModelWrapper.from_backbone(pretraining, None)
    assert wrapper.patch_tokens(pixels).shape == (2, 4, 4, 32)
    assert pretraining(pixels).mask.float().mean() == 0.75


def test_output_raw_and_clean_come_from_one_forward(mae, projection, pixels):
    outputs = SOAPModelWrapper.from_backbone(mae, projection)(pixels, output_raw=True)
    raw, clean = outputs.raw_last_hidden_state[:, 1:], outputs.last_hidden_state[:, 1:]
    torch.testing.assert_close(clean, projection(raw), rtol=0, atol=0)
    assert not torch.equal(clean, raw)


def test_a_hidden_layer_is_cleaned_where_it_is_read_but_feeds_nothing(vit, projection, pixels):
    wrapper = SOAPModelWrapper.from_backbone(vit, {1: projection, 2: projection})
    outputs, bare = wrapper(pixels, output_raw=True), vit(pixels, output_hidden_states=True)
    assert torch.equal(outputs.last_hidden_state, bare.last_hidden_state)
    for layer, state in enumerate(bare.hidden_states):
        assert torch.equal(outputs.raw_hidden_states[layer], state)
        changed = not torch.equal(outputs.hidden_states[layer], state)
        assert changed == (layer in (1, 2))
    torch.testing.assert_close(
        wrapper.patch_tokens(pixels, layer=1).flatten(1, 2), projection(bare.hidden_states[1])[:, 1:]
    )


def test_tuples_pooling_and_attentions_are_the_backbones_own(vit, projection, pixels):
    wrapper = SOAPModelWrapper.from_backbone(vit, projection)
    named = wrapper(pixels, output_hidden_states=True)
    plain = wrapper(pixels, output_hidden_states=True, return_dict=False)
    assert torch.equal(plain[0], named.last_hidden_state)
    assert torch.equal(named.pooler_output, vit(pixels).pooler_output)
    assert len(named.hidden_states) == 3


def test_disabled_is_the_bare_backbone_and_ends_with_its_block(vit, projection, pixels):
    wrapper = SOAPModelWrapper.from_backbone(vit, projection)
    clean = wrapper(pixels).last_hidden_state
    with wrapper.disabled(), wrapper.disabled():
        assert torch.equal(wrapper(pixels).last_hidden_state, vit(pixels).last_hidden_state)
    with pytest.raises(ZeroDivisionError), wrapper.disabled():
        raise ZeroDivisionError
    assert torch.equal(wrapper(pixels).last_hidden_state, clean)
    assert torch.equal(wrapper.patch_tokens(pixels, raw=True).flatten(1, 2), vit(pixels).last_hidden_state[:, 1:])


def test_a_head_that_removes_nothing_changes_nothing(vit, pixels):
    outputs = SOAPModelWrapper.from_backbone(vit, None)(pixels)
    assert torch.equal(outputs.last_hidden_state, vit(pixels).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_head_stays_float32_in_a_half_precision_model(vit, projection, pixels, dtype):
    basis = projection.basis.clone()
    wrapper = SOAPModelWrapper.from_backbone(vit, projection).to(dtype)
    outputs = wrapper(pixels.to(dtype), output_raw=True)
    assert outputs.last_hidden_state.dtype == dtype
    assert torch.equal(wrapper.projections["-1"].basis, basis)
    expected = projection(outputs.raw_last_hidden_state[:, 1:].float()).to(dtype)
    assert torch.equal(outputs.last_hidden_state[:, 1:], expected)


@pytest.mark.parametrize("which", ["vit", "mae"])
def test_compiles_in_one_graph(which, projection, pixels, request):
    wrapper = SOAPModelWrapper.from_backbone(request.getfixturevalue(which), projection)
    compiled = torch.compile(wrapper, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(pixels).last_hidden_state, wrapper(pixels).last_hidden_state)


def test_gradients_reach_the_backbone_and_checkpointing_changes_none(vit, projection, pixels):
    wrapper = SOAPModelWrapper.from_backbone(vit, projection).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            # its name since transformers 5.24
            enable = getattr(wrapper, "activation_checkpointing_enable", None) or wrapper.gradient_checkpointing_enable
            enable()
        wrapper.zero_grad()
        wrapper(pixels).last_hidden_state.square().sum().backward()
        gradients.append(vit.embeddings.patch_embeddings.projection.weight.grad.clone())
    assert gradients[0].norm() > 0
    torch.testing.assert_close(*gradients)


def test_deepcopy_is_independent(mae, projection, pixels):
    wrapper = SOAPModelWrapper.from_backbone(mae, projection)
    clone = copy.deepcopy(wrapper)
    expected = wrapper(pixels).last_hidden_state
    with torch.no_grad():
        for parameter in wrapper.backbone.parameters():
            parameter.zero_()
    assert torch.equal(clone(pixels).last_hidden_state, expected)


def test_reweight_equals_the_projection_of_the_statistics(vit, statistics, pixels):
    wrapper = SOAPModelWrapper.from_backbone(vit, statistics.projection(), statistics=statistics)
    assert wrapper.config.ranks == [2]
    for mu in (0, 1, 5, "auto"):
        assert wrapper.reweight(mu=mu) is wrapper
        assert wrapper.config.ranks == [statistics.projection(mu).rank]
        expected = statistics.projection(mu)(vit(pixels).last_hidden_state[:, 1:])
        torch.testing.assert_close(wrapper(pixels).last_hidden_state[:, 1:], expected)
    assert [row["weight"] for row in wrapper.config.components[0]][:2] == pytest.approx(
        sorted(statistics.weights().tolist(), reverse=True)[:2]
    )


def test_a_refused_reweight_leaves_the_head_as_it_was(vit, statistics, pixels):
    wrapper = SOAPModelWrapper.from_backbone(vit, statistics.projection(), statistics=statistics)
    before = wrapper(pixels).last_hidden_state
    for arguments in ({"mu": "all"}, {"tau": 0.0}):
        with pytest.raises(SOAPError):
            wrapper.reweight(**arguments)
    assert torch.equal(wrapper(pixels).last_hidden_state, before)
    assert wrapper.config.mu == "auto"


def test_reweight_without_statistics_says_so(vit, projection):
    with pytest.raises(HeadError, match="without statistics"):
        SOAPModelWrapper.from_backbone(vit, projection).reweight(2)


def test_a_head_of_another_width_is_refused(vit):
    with pytest.raises(HeadError, match=r"width 8, but those of layer -1 of ViTModel have width 32"):
        SOAPModelWrapper.from_backbone(vit, random_projection(8))


def test_what_is_not_a_vision_model_is_refused(projection):
    from transformers import BertConfig, BertModel

    text = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    with pytest.raises(BackboneError, match="not a vision backbone"):
        SOAPModelWrapper.from_backbone(text, projection)
    with pytest.raises(BackboneError, match="Linear cannot be called with images"):
        SOAPModelWrapper.from_backbone(torch.nn.Linear(2, 2), projection)
    with pytest.raises(BackboneError, match="must be a transformers model, a hub id or a folder, not Tensor"):
        SOAPModelWrapper.from_backbone(torch.zeros(2), projection)


def test_from_config_has_the_shape_of_the_head(vit, projection, pixels):
    wrapper = SOAPModelWrapper.from_backbone(vit, projection)
    built = AutoModel.from_config(wrapper.config).eval()
    assert built(pixels).last_hidden_state.shape == (2, 17, 32)
    assert {name: tensor.shape for name, tensor in built.state_dict().items()} == {
        name: tensor.shape for name, tensor in wrapper.state_dict().items()
    }


def test_an_overridden_layout_is_used_and_stored(vit, pixels):
    direction = SOAPProjection(torch.eye(32)[:, :1], torch.ones(1))
    wrapper = SOAPModelWrapper.from_backbone(vit, direction, layout=PatchLayout(suffix=1, stride=8))
    clean, raw = wrapper(pixels).last_hidden_state, vit(pixels).last_hidden_state
    assert clean[:, :16, 0].abs().max() < 1e-5
    assert torch.equal(clean[:, 16], raw[:, 16])
    assert wrapper.config.layouts == [PatchLayout(suffix=1, stride=8).to_dict()]


def test_fitted_on_one_size_and_used_at_another(vit, images: Dataset, processor):
    model = fit_soap(vit, images, image_processor=processor, image_size=64, mu=3, num_images=16, progress=False)
    assert model.config.fit["image_size"] == [64, 64]
    assert model.patch_tokens(torch.randn(1, 3, 32, 48)).shape == (1, 4, 6, 32)


def test_pooled_tokens_are_an_output(vit, projection, pixels):
    wrapper = SOAPModelWrapper.from_backbone(vit, {1: random_projection(32), -1: projection})
    tokens = wrapper(pixels).last_hidden_state
    cls, mean = tokens[:, 0], tokens[:, 1:].mean(1)
    for pooling, expected in {"mean": mean, "cls": cls, "cls+mean": torch.cat((cls, mean), dim=1)}.items():
        torch.testing.assert_close(wrapper(pixels, pooling=pooling).image_embeds, expected)
        torch.testing.assert_close(wrapper(pixels, pooling=pooling, return_dict=False)[-1], expected)
    assert "image_embeds" not in wrapper(pixels)
    with wrapper.disabled():
        torch.testing.assert_close(
            wrapper(pixels, pooling="mean").image_embeds, vit(pixels).last_hidden_state[:, 1:].mean(1)
        )


def test_pooling_that_is_not_possible_is_refused(vit, projection, pixels):
    with pytest.raises(SOAPError, match="one of mean, cls, "):
        SOAPModelWrapper.from_backbone(vit, projection)(pixels, pooling="max")
    without_cls = SOAPModelWrapper.from_backbone(TINY_BACKBONES["ijepa"].build(), projection)
    with pytest.raises(SOAPError, match="no token before its patches"):
        without_cls(pixels, pooling="cls")


@pytest.mark.parametrize("name", ["convnext", "pixtral"])
def test_maps_and_packed_tokens_are_pooled_image_by_image(name):
    tiny = TINY_BACKBONES[name]
    model = SOAPModelWrapper.from_backbone(tiny.build(), None)
    pixels = torch.randn(2, 3, *tiny.size)
    pooled = model(pixels, pooling="mean").image_embeds
    torch.testing.assert_close(pooled, model.patch_tokens(pixels).mean((1, 2)))
    assert pooled.shape == (2, model.config.hidden_size)
