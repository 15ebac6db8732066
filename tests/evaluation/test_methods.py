"""Every method is a projection of the same raw tokens: none, the head's own, or that of a baseline."""

import pytest
import torch
from torch.nn.functional import normalize
from transformers import ViTImageProcessorPil

from soap_hf import SOAPConfig, SOAPModelWrapper, SOAPStatistics
from soap_hf.data.preprocessing import ImagePreprocessor
from soap_hf.evaluation.comparison import Comparison
from soap_hf.evaluation.methods import as_baseline, head_layer, head_preprocessor, method_projections
from soap_hf.heads.glance import glance
from soap_hf.heads.provenance import METHODS
from soap_hf.runtime.errors import HeadError, SOAPError
from tests.conftest import random_projection


@pytest.fixture
def statistics() -> SOAPStatistics:
    """Of tokens whose variance falls from the first dimension to the last."""
    real, synthetic = torch.randn(2, 50, 4, 4, 32) * torch.linspace(2, 0.1, 32)
    return SOAPStatistics.from_tokens(real, synthetic)


@pytest.fixture
def model(vit, projection, processor, statistics) -> SOAPModelWrapper:
    """A head of rank 2 on the tiny ViT, with statistics."""
    return SOAPModelWrapper.from_backbone(vit, projection, image_processor=processor, statistics=statistics)


def black_tokens(model: SOAPModelWrapper, size: int = 32, layer: int = -1) -> torch.Tensor:
    """Unit raw patch tokens of a black image, less their mean, `(patches, D)`."""
    black = ImagePreprocessor(model.image_processor).normalize(torch.zeros(1, 3, size, size))
    with torch.no_grad():
        tokens = normalize(model.patch_tokens(black, layer, raw=True).flatten(0, -2), dim=-1)
    return tokens - tokens.mean(dim=0)


def test_raw_comes_first_and_is_the_identity(model):
    methods = method_projections(model, ["top-pc", "soap", "top-pc"])
    assert list(methods) == ["raw", "top-pc", "soap"]
    tokens = torch.randn(3, 32)
    assert torch.equal(methods["raw"](tokens), tokens)


def test_soap_is_what_the_model_does(model):
    comparison = Comparison.of(model)
    pixels = torch.randn(2, 3, 32, 32)
    raw, cls = comparison.raw_tokens(pixels)
    with torch.no_grad():
        outputs = model(pixels, output_raw=True)
    assert torch.equal(raw.flatten(1, 2), outputs.raw_last_hidden_state[:, 1:])
    assert torch.equal(cls, outputs.last_hidden_state[:, 0])
    assert torch.equal(comparison.methods["soap"](raw).flatten(1, 2), outputs.last_hidden_state[:, 1:])


@pytest.mark.parametrize("rank", [1, 3])
def test_zero_image_leaves_the_least_that_many_directions_can(rank, vit, processor):
    with torch.no_grad():  # lengths that differ from patch to patch, and must not count
        vit.embeddings.position_embeddings.mul_(torch.linspace(1, 60, 17)[:, None])
    model = SOAPModelWrapper.from_backbone(vit, None, layer=1, image_processor=processor)
    tokens = black_tokens(model, layer=1)
    left = method_projections(model, ["zero-image"], rank=rank)["zero-image"](tokens)
    smallest = torch.linalg.svdvals(tokens)[rank:].square().sum()
    torch.testing.assert_close(left.square().sum(), smallest, rtol=1e-3, atol=1e-6)


def test_zero_image_looks_at_the_size_asked_for(model):
    small, large = (
        method_projections(model, ["zero-image"], preprocess=head_preprocessor(model, size))["zero-image"]
        for size in (32, 48)
    )
    tokens = black_tokens(model, 48)
    assert large(tokens).norm() < 0.999 * small(tokens).norm()


def test_top_pc_removes_the_components_of_largest_variance(model, statistics, tmp_path):
    statistics.save(tmp_path / "by-score")
    for known in (statistics, SOAPStatistics.load(tmp_path / "by-score")):
        projection = method_projections(model.set_statistics({-1: known}), ["top-pc"], rank=3)["top-pc"]
        assert torch.equal(projection.basis, statistics.components[:, :3].float())
        assert projection.weights.tolist() == [1, 1, 1]


def test_rivals_remove_as_many_directions_as_the_head(model):
    methods = method_projections(model, ["soap", "zero-image", "top-pc"])
    assert [method.rank for method in methods.values()] == [0, 2, 2, 2]


def test_the_model_stays_as_it_is(model):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    comparison = Comparison.of(model, ["soap", "zero-image", "top-pc"])
    comparison.raw_tokens(torch.randn(1, 3, 32, 32))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_head_of_several_layers_is_compared_on_one(vit, processor):
    projections = {1: random_projection(32), -1: random_projection(32, rank=3)}
    model = SOAPModelWrapper.from_backbone(vit, projections, image_processor=processor)
    assert (head_layer(model), head_layer(model, 1)) == (-1, 1)
    assert Comparison.of(model).methods["soap"].rank == 3
    comparison = Comparison.of(model, layer=1)
    assert comparison.methods["soap"].rank == 2
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        clean = model.patch_tokens(pixels, 1)
    torch.testing.assert_close(comparison.methods["soap"](comparison.raw_tokens(pixels).patches), clean)
    with pytest.raises(HeadError, match=r"no layer 0; choose from 1, -1"):
        Comparison.of(model, layer=0)


def test_what_cannot_be_compared_is_refused(model, vit, processor, tmp_path):
    with pytest.raises(SOAPError, match=r"no method 'pca'; choose from soap, zero-image, top-pc"):
        method_projections(model, ["pca"])
    with pytest.raises(SOAPError, match=r"differ along \d+ directions only"):
        method_projections(model, ["zero-image"], rank=20)
    model.save_pretrained(tmp_path)
    bare = SOAPModelWrapper.from_backbone(vit, None, image_processor=processor)
    assert list(method_projections(bare, ["soap"])) == ["raw", "soap"]
    with pytest.raises(HeadError, match="At rank 0 zero-image and top-pc would remove nothing"):
        method_projections(bare, ["zero-image", "top-pc"])
    with pytest.raises(HeadError, match="without statistics"):
        method_projections(bare, ["top-pc"], rank=1)


def test_a_component_that_was_not_saved_is_named(model, statistics, tmp_path):
    statistics.save(tmp_path / "few", num_components=2)
    few = SOAPStatistics.load(tmp_path / "few")
    model.set_statistics({-1: few})
    missing = next(number for number in range(32) if number not in few.component_indices)
    with pytest.raises(SOAPError, match=f"number {missing} is the first"):
        method_projections(model, ["top-pc"], rank=32)


def test_pixels_are_made_as_the_head_says_else_as_its_backbone(vit, projection, tmp_path, caplog):
    vit.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(tmp_path)
    of_backbone = SOAPModelWrapper.from_backbone(str(tmp_path), projection)
    assert head_preprocessor(of_backbone).size == (48, 48)
    assert head_preprocessor(of_backbone, (16, 24)).size == (16, 24)
    own = ViTImageProcessorPil(size={"height": 40, "width": 40})
    assert head_preprocessor(SOAPModelWrapper.from_backbone(vit, projection, image_processor=own)).size == (40, 40)
    vit.config.name_or_path = ""
    assert head_preprocessor(SOAPModelWrapper.from_backbone(vit, projection)).size == (32, 32)
    assert "No image processor" in caplog.text


@pytest.mark.parametrize("method", ["zero-image", "top-pc"])
def test_a_baseline_is_saved_as_a_head_and_named_as_one(model, method, tmp_path):
    model.reweight(2)
    soap, wanted = model.projections["-1"].matrix(), method_projections(model, [method], rank=3)[method].matrix()
    as_baseline(model, method, rank=3).save_pretrained(tmp_path / "head", include_backbone=True)
    loaded = SOAPModelWrapper.from_pretrained(tmp_path / "head")
    assert (loaded.config.method, loaded.config.ranks, loaded.config.checks) == (method, [3], [])
    torch.testing.assert_close(loaded.projections["-1"].matrix(), wanted)
    assert {row["weight"] for row in loaded.config.components[0]} == {0}
    assert glance(tmp_path / "head").method == method
    comparison = Comparison.of(loaded)
    assert list(comparison.methods) == ["raw", method], "it is called what it is"
    torch.testing.assert_close(comparison.methods[method].matrix(), wanted)
    methods = Comparison.of(loaded, ["soap", method], rank=1).methods
    torch.testing.assert_close(methods["soap"].matrix(), soap)
    assert methods[method].rank == 1
    card = (tmp_path / "head" / "README.md").read_text(encoding="utf-8")
    assert "*baseline* of [SOAP]" in card
    assert f"({method}: {METHODS[method]}, entirely)" in card
    torch.testing.assert_close(loaded.reweight(2).projections["-1"].matrix(), soap)
    assert loaded.config.method == "soap"


def test_a_head_of_several_layers_becomes_a_baseline_in_each(vit, processor):
    projections = {1: random_projection(32), -1: random_projection(32, rank=3)}
    model = SOAPModelWrapper.from_backbone(vit, projections, image_processor=processor)
    assert as_baseline(model, "zero-image").config.ranks == [2, 3]
    with pytest.raises(SOAPError, match="'soap' is no baseline; choose from zero-image, top-pc"):
        as_baseline(model, "soap")


def test_what_a_config_calls_its_method_is_checked():
    assert SOAPConfig().method == "soap", "as heads are that say nothing of it"
    for other in ("pca", 3, None, ["soap"]):
        with pytest.raises(HeadError, match="method of the wrong kind"):
            SOAPConfig(method=other)


def test_a_strength_is_no_negative_number_and_not_nearly_everything(model, caplog):
    for call in (model.reweight, lambda mu: Comparison.of(model, mu=[mu])):
        with pytest.raises(SOAPError, match=r"mu=-1 is below 0, .*; 0 removes nothing"):
            call(-1)
    model.reweight(16)
    assert not caplog.text
    model.reweight(17)
    assert "17 of the 32 directions of layer -1 are removed, which leaves little" in caplog.text


@pytest.mark.parametrize(
    ("size", "way_out"), [((36, 36), "32 is one"), ((32, 41), "32x40 is one"), ((4, 8), "8 is one")]
)
def test_a_size_in_parts_of_patches_is_warned_of(model, caplog, size, way_out):
    head_preprocessor(model, (40, 32))
    assert not caplog.text
    head_preprocessor(model, size)
    assert f"{size[0]} x {size[1]} is no whole number of the backbone's patches of 8 pixels" in caplog.text
    assert way_out in caplog.text
