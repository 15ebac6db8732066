"""A folded head gives what an attached one gives, with the model's own modules, and comes out again."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import SiglipForImageClassification

from soap_hf import SOAPModelWrapper, SOAPProjection, attach_soap, fold, fold_into_linear, unfold
from soap_hf.attach.folding import SOAPFolding
from soap_hf.runtime.errors import HeadError, OutputError
from tests.attach.host_models import HOSTS, PlainViT
from tests.conftest import random_projection
from tests.tiny_backbones import COMPOSITES

FOLDABLE = {  # and the output that the weights make; other outputs only hand tokens on
    "ViT reconstruction": "reconstruction",
    "SigLIP classifier": "logits",
    "LLaVA": "pooler_output",
    "like timm": None,
    "plain module": None,
}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 32, 32)


def siglip_classifier():
    return SiglipForImageClassification(COMPOSITES["siglip"].build().config).eval()


def result(host, name, model, pixels):
    outputs = host.call(model, pixels)
    made = outputs if FOLDABLE[name] is None else outputs[FOLDABLE[name]]
    return torch.stack(tuple(made)) if isinstance(made, (list, tuple)) else made


def anatomy(model):
    """Modules, shapes and hooks of a model."""
    modules = [(path, type(module), len(module._forward_hooks)) for path, module in model.named_modules()]
    return modules, [(name, parameter.shape) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize("name", FOLDABLE)
def test_folded_equals_attached_and_unfolds(name, pixels, tmp_path):
    host = HOSTS[name]
    model = host.build().eval()
    head = SOAPModelWrapper.from_backbone(host.backbone(model), dict.fromkeys(host.layers, random_projection(32)))
    bare = result(host, name, model, pixels)
    with attach_soap(model, head, host.module):
        attached = result(host, name, model, pixels)
    assert (attached - bare).abs().max() > 1e-3
    before = anatomy(model)
    folding = fold(model, head, host.module)
    assert anatomy(model) == before
    torch.testing.assert_close(result(host, name, model, pixels), attached, rtol=0, atol=1e-5)
    folding.save(tmp_path / "folding.safetensors")
    unfold(model, tmp_path / "folding.safetensors")
    torch.testing.assert_close(result(host, name, model, pixels), bare, rtol=0, atol=1e-6)
    assert anatomy(model) == before


@pytest.mark.parametrize(
    ("name", "layer", "sentence"),
    [
        ("ViT classifier", -1, "No Linear or 1 x 1 convolution of ViTForImageClassification reads the patch tokens"),
        ("ViT-MAE pretraining", -1, r"as they are \(decoder.decoder_embed gets them with other tokens"),
        ("DPT on DINOv2", 2, r"neck.reassemble_stage.layers.1.projection gets them with other tokens, or changed"),
        (
            "UperNet on DINOv2",
            2,
            "Something else than decode_head.psp_modules.* depends on the patch tokens",
        ),
    ],
)
def test_what_cannot_be_folded_is_refused_with_the_reason_and_left_alone(name, layer, sentence, pixels):
    host = HOSTS[name]
    model = host.build().eval()
    head = SOAPModelWrapper.from_backbone(host.backbone(model), {layer: random_projection(32)})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(HeadError, match=sentence):
        fold(model, head)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_second_reader_that_is_not_linear_is_found(projection):
    class TwoReaders(PlainViT):
        def forward(self, pixels):
            tokens = self.forward_tokens(pixels)[:, 1:]
            return self.classifier(tokens.mean(1)), tokens.norm(dim=-1)

    model = TwoReaders().eval()
    head = SOAPModelWrapper.from_backbone(HOSTS["plain module"].backbone(model), projection)
    with pytest.raises(HeadError, match="Something else than classifier depends on the patch tokens of layer -1"):
        fold(model, head, "norm")


def test_all_linear_readers_are_folded_together(projection, pixels):
    class TwoReaders(PlainViT):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(32, 3, 1)

        def forward(self, pixels):
            tokens = self.forward_tokens(pixels)[:, 1:]
            grid = tokens.transpose(1, 2).unflatten(2, (4, 4))
            larger = nn.functional.interpolate(grid, scale_factor=2, mode="bilinear")
            return torch.cat((self.conv(larger).flatten(1), self.classifier(tokens).flatten(1)), dim=1)

    model = TwoReaders().eval()
    head = SOAPModelWrapper.from_backbone(HOSTS["plain module"].backbone(model), projection)
    with attach_soap(model, head, "norm"):
        attached = model(pixels)
    assert set(fold(model, head, "norm").deltas) == {"classifier", "conv"}
    torch.testing.assert_close(model(pixels), attached, rtol=0, atol=1e-5)


def test_a_shared_weight_is_left_alone(projection, pixels):
    model = siglip_classifier()
    model.other = nn.Linear(32, 2)
    model.other.weight = model.classifier.weight
    with pytest.raises(HeadError, match="weight of classifier is shared"):
        fold(model, projection)


def test_folding_and_unfolding_follow_each_other(projection, pixels):
    model = siglip_classifier()
    with attach_soap(model, projection), pytest.raises(HeadError, match="detach it before folding"):
        fold(model, projection)
    folding = fold(model, projection)
    model.classifier.weight.add_(0.01 * torch.randn(2, 32))  # trained further
    unfold(model, folding)
    with pytest.raises(HeadError, match="not folded into classifier"):
        unfold(model, folding)
    with pytest.raises(HeadError, match="no weights at classifier"):
        unfold(nn.Linear(2, 2), folding)


def test_a_head_of_rank_0_is_refused(pixels):
    with pytest.raises(HeadError, match="removes nothing"):
        fold(siglip_classifier(), SOAPProjection.identity(32))


def test_a_folding_is_small_and_its_file_is_checked(projection, tmp_path):
    folding = fold(siglip_classifier(), projection)
    assert [tensor.shape for tensor in vars(folding.deltas["classifier"]).values()] == [(2, 2), (32, 2), (2,)]
    assert repr(folding) == "SOAPFolding(classifier)"
    folding.save(tmp_path / "folding.safetensors")
    loaded = SOAPFolding.load(tmp_path / "folding.safetensors")
    assert torch.equal(loaded.deltas["classifier"].left, folding.deltas["classifier"].left)
    with pytest.raises(OutputError):
        folding.save(tmp_path / "nowhere" / "folding.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(HeadError, match="not what folding a head has saved"):
        SOAPFolding.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("linear", [nn.Linear(32, 5), nn.Conv2d(32, 5, 1), nn.Linear(32, 5, bias=False)])
def test_a_linear_map_takes_a_projection_in(linear, projection):
    tokens, weight = torch.randn(3, 7, 6, 32), linear.weight.clone()
    inputs, clean = tokens, projection(tokens)
    if isinstance(linear, nn.Conv2d):
        inputs, clean = inputs.movedim(-1, 1), clean.movedim(-1, 1)
    folded = fold_into_linear(linear, projection)
    torch.testing.assert_close(folded(inputs), linear(clean), rtol=0, atol=1e-5)
    assert torch.equal(linear.weight, weight)
    assert type(folded) is type(linear)
    assert fold_into_linear(linear.to(torch.bfloat16), projection).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("other", [nn.Linear(8, 5), nn.Conv2d(32, 5, 3), nn.Conv2d(32, 32, 1, groups=32)])
def test_other_maps_are_refused(other, projection):
    with pytest.raises(HeadError, match="of so many features"):
        fold_into_linear(other, projection)
