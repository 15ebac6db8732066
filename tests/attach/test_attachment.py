"""An attached head cleans what the model reads, changes nothing else, and leaves no trace when it is detached."""

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTForMaskedImageModeling, ViTMAEForPreTraining, ViTModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging as transformers_logging

from soap_hf import PatchLayout, SOAPModelWrapper, SOAPProjection, attach_soap
from soap_hf.attach.attachment import detach_soap
from soap_hf.attach.hosts import depends
from soap_hf.runtime.errors import BackboneError, HeadError, LayoutError
from tests.attach.host_models import HOSTS, IDS, PlainViT
from tests.conftest import random_projection
from tests.tiny_backbones import COMPOSITES, VIT


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 32, 32)


@pytest.fixture
def model():
    """A model that reads the patch tokens of its ViT."""
    return ViTForMaskedImageModeling(ViTConfig(**VIT, encoder_stride=8)).eval()


@pytest.fixture
def said(caplog):
    """What the package warns of."""
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield lambda: caplog.text
    transformers_logging.disable_propagation()


def tensors(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    parts = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, (list, tuple)) else []
    return [tensor for part in parts for tensor in tensors(part)]


def same(first, second):
    pairs = list(zip(tensors(first), tensors(second), strict=True))
    return bool(pairs) and all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in pairs)


def tokens_given(host, model, pixels):
    """The tensors that a model gives to the module that reads its tokens."""
    reader, given = model.get_submodule(host.reader), []
    if host.reads_output:
        hook = reader.register_forward_hook(lambda _, __, outputs: given.append(outputs.last_hidden_state))
    else:
        hook = reader.register_forward_pre_hook(lambda _, arguments: given.extend(tensors(arguments[0])))
    try:
        host.call(model, pixels)
    finally:
        hook.remove()
    return given


@pytest.mark.parametrize("name", HOSTS)
def test_the_model_reads_what_the_wrapper_gives_and_is_as_it_was_afterwards(name, pixels, said):
    host = HOSTS[name]
    model = host.build().eval()
    wrapper = SOAPModelWrapper.from_backbone(
        host.backbone(model), {layer: random_projection(32) for layer in host.layers}
    )
    expected = host.read(wrapper(pixels))
    before, raw = host.call(model, pixels), tokens_given(host, model, pixels)
    with attach_soap(model, wrapper, host.module):
        clean = tokens_given(host, model, pixels)
    assert same(host.call(model, pixels), before)
    assert ("Nothing that" in said()) == host.warns
    assert len(clean) == len(expected)
    for one, other, bare in zip(clean, expected, raw, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        assert not torch.allclose(one, bare, atol=1e-3)


@pytest.mark.parametrize("name", HOSTS)
def test_an_exception_inside_the_block_detaches_too(name, pixels):
    host = HOSTS[name]
    model = host.build().eval()
    before = host.call(model, pixels)
    head = SOAPModelWrapper.from_backbone(host.backbone(model), dict.fromkeys(host.layers, random_projection(32)))
    with pytest.raises(KeyboardInterrupt), attach_soap(model, head, host.module):
        raise KeyboardInterrupt
    assert same(host.call(model, pixels), before)


def test_masked_patches_in_random_order_are_cleaned_one_by_one(pixels):
    model = HOSTS["ViT-MAE pretraining"].build().eval()
    model.config.mask_ratio = 0.75
    noise, projection = torch.rand(2, 16), random_projection(32)
    raw = model.vit(pixels, noise=noise).last_hidden_state
    assert raw.shape[1] == 5
    with attach_soap(model, projection):
        clean = model.vit(pixels, noise=noise).last_hidden_state
    assert torch.equal(clean[:, 0], raw[:, 0])
    torch.testing.assert_close(clean[:, 1:], projection(raw[:, 1:]))
    assert isinstance(model, ViTMAEForPreTraining)
    assert model.vit.config.mask_ratio == 0.75


def test_a_head_in_a_folder_needs_no_second_backbone(vit, projection, pixels, tmp_path):
    SOAPModelWrapper.from_backbone(vit, projection).save_pretrained(tmp_path / "head")
    raw = vit(pixels).last_hidden_state
    with attach_soap(vit, tmp_path / "head"):
        torch.testing.assert_close(vit(pixels).last_hidden_state[:, 1:], projection(raw[:, 1:]))


def test_later_blocks_and_the_pooled_output_never_see_clean_tokens(pixels):
    model = COMPOSITES["siglip"].build()
    tower = model.vision_model
    before = tower(pixels, output_hidden_states=True)
    with attach_soap(model, random_projection(32), layer=1):
        after = tower(pixels, output_hidden_states=True)
    assert not torch.equal(after.hidden_states[1], before.hidden_states[1])
    for name in ("last_hidden_state", "pooler_output"):
        assert torch.equal(after[name], before[name])
    assert torch.equal(after.hidden_states[2], before.hidden_states[2])


def test_a_named_module_gives_clean_tokens_to_all_that_read_it(pixels, said):
    model = COMPOSITES["siglip"].build()
    before = model(IDS, pixels)
    with attach_soap(model, random_projection(32)):
        assert torch.equal(model(IDS, pixels).image_embeds, before.image_embeds)
    assert "Nothing that SiglipModel computes depends on the patch tokens of layer -1 of vision_model" in said()
    layout = PatchLayout(stride=8)
    with attach_soap(model, random_projection(32), "vision_model.post_layernorm", layout=layout):
        assert not torch.equal(model(IDS, pixels).image_embeds, before.image_embeds)


def test_a_model_that_reads_other_layers_is_told_which(said):
    attach_soap(HOSTS["LLaVA"].build().eval(), random_projection(32))
    assert "layer -1 of vision_tower, so cleaning them changes no result; what it reads is layer 1." in said()
    with pytest.raises(BackboneError, match=r"never last_hidden_state: fit a head on those, with layer=\[1, 2\]"):
        attach_soap(HOSTS["DPT on DINOv2"].build().eval(), random_projection(32))


def test_heads_nest_and_come_off_in_any_order(model, pixels):
    first, second = random_projection(32), random_projection(32)
    bare, tokens = model(pixels).reconstruction, model.vit(pixels).last_hidden_state[:, 1:]
    one, other = attach_soap(model, first), attach_soap(model, second)
    torch.testing.assert_close(model.vit(pixels).last_hidden_state[:, 1:], second(first(tokens)))
    one.detach()
    torch.testing.assert_close(model.vit(pixels).last_hidden_state[:, 1:], second(tokens))
    other.detach()
    other.detach()
    assert torch.equal(model(pixels).reconstruction, bare)


def test_the_same_head_is_not_attached_twice(model, pixels, projection):
    with attach_soap(model, projection):
        once = model(pixels).reconstruction
        with pytest.raises(HeadError, match="attached to vit already; detach it first"):
            attach_soap(model, copy.deepcopy(projection))
        assert torch.equal(model(pixels).reconstruction, once)
    attach_soap(model, projection).detach()


def test_a_copy_keeps_the_head_and_loses_it_on_its_own(model, pixels, projection):
    bare = model(pixels).reconstruction
    with attach_soap(model, projection):
        clean = model(pixels).reconstruction
        clone = copy.deepcopy(model)
    assert torch.equal(model(pixels).reconstruction, bare)
    assert torch.equal(clone(pixels).reconstruction, clean)
    detach_soap(clone)
    assert torch.equal(clone(pixels).reconstruction, bare)


def test_a_model_is_saved_without_the_head(model, pixels, projection, tmp_path):
    bare, names = model(pixels).reconstruction, list(model.state_dict())
    with attach_soap(model, projection):
        assert list(model.state_dict()) == names
        model.save_pretrained(tmp_path)
    assert torch.equal(ViTForMaskedImageModeling.from_pretrained(tmp_path).eval()(pixels).reconstruction, bare)


def test_the_head_is_not_shared_and_the_model_is_not_copied(model, projection):
    parameters = [parameter.data_ptr() for parameter in model.parameters()]
    with attach_soap(model, projection) as attached:
        assert [parameter.data_ptr() for parameter in model.parameters()] == parameters
        assert attached.projections[-1] is not projection
        assert repr(attached) == "SOAPAttachment(2 of layer -1 on ViTForMaskedImageModeling.vit)"
    assert "detached from" in repr(attached)


def test_compiled_before_or_after_attaching(model, pixels, projection):
    bare = model(pixels).reconstruction
    with attach_soap(model, projection):
        clean = model(pixels).reconstruction
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(pixels).reconstruction, clean)
    assert torch.equal(compiled(pixels).reconstruction, bare)
    with attach_soap(compiled, projection):
        assert torch.equal(compiled(pixels).reconstruction, clean)
    assert torch.equal(compiled(pixels).reconstruction, bare)
    torch.compiler.reset()


def test_data_parallel_before_or_after_attaching(model, pixels, projection):
    with attach_soap(model, projection):
        clean = model(pixels).reconstruction
        assert torch.equal(nn.DataParallel(model)(pixels).reconstruction, clean)
    parallel = nn.DataParallel(model)
    with attach_soap(parallel, projection):
        assert torch.equal(parallel(pixels).reconstruction, clean)


def test_training_goes_through_and_the_mode_stays(model, pixels, projection):
    model.train()
    model.vit.layernorm.eval()
    modes = [module.training for module in model.modules()]
    with torch.enable_grad(), attach_soap(model, projection):
        assert [module.training for module in model.modules()] == modes
        model(pixels).reconstruction.sum().backward()
    assert model.vit.embeddings.patch_embeddings.projection.weight.grad.norm() > 0


def test_attaching_draws_no_random_numbers(model, projection):
    state = torch.get_rng_state()
    attach_soap(model, projection).detach()
    assert torch.equal(torch.get_rng_state(), state)


def test_tuples_are_cleaned_as_named_outputs_are(vit, pixels, projection):
    with attach_soap(vit, projection), attach_soap(vit, random_projection(32), layer=1):
        named = vit(pixels, output_hidden_states=True)
        plain = vit(pixels, output_hidden_states=True, return_dict=False)
    assert torch.equal(plain[0], named.last_hidden_state)
    assert all(torch.equal(one, other) for one, other in zip(plain[2], named.hidden_states, strict=True))


class Retrieval(nn.Module):
    """Somebody's own module around a backbone, with arguments of its own."""

    def __init__(self):
        super().__init__()
        self.encoder = ViTModel(ViTConfig(**VIT)).eval()

    def forward(self, *, batch):
        return self.encoder(batch).last_hidden_state[:, 1:].mean(1)


def test_a_model_with_arguments_of_its_own_is_called_with_inputs(pixels, projection):
    model, inputs = Retrieval(), {"batch": pixels}
    bare = model(**inputs)
    with pytest.raises(BackboneError, match=r"Retrieval cannot be called with one image of 32 x 32 .*; pass inputs="):
        attach_soap(model, projection)
    with attach_soap(model, projection, inputs=inputs):
        torch.testing.assert_close(model(**inputs), projection(bare))


def bert():
    return BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))


def two_backbones():
    return nn.ModuleDict({"left": ViTModel(ViTConfig(**VIT)), "right": ViTModel(ViTConfig(**VIT))})


@pytest.mark.parametrize(
    ("build", "arguments", "error", "sentence"),
    [
        (PlainViT, {}, BackboneError, "holds no vision backbone .*; pass module="),
        (bert, {}, BackboneError, "BertModel holds no vision backbone"),
        (two_backbones, {}, BackboneError, r"several vision backbones: .* 'left' \(ViTModel\), 'right' \(ViTModel\)"),
        (PlainViT, {"module": "nrom"}, BackboneError, "PlainViT has no module 'nrom'"),
        (PlainViT, {"module": "norm"}, LayoutError, "does not say which tokens of norm are patches"),
        (
            PlainViT,
            {"module": "classifier", "layout": PatchLayout(), "inputs": torch.zeros(1, 3, 32, 32)},
            BackboneError,
            r"classifier gives a tensor of shape \(1, 5\), which holds no patch tokens",
        ),
        (
            PlainViT,
            {"module": "norm", "layout": PatchLayout(stride=8), "inputs": torch.zeros(1, 3, 32, 32)},
            LayoutError,
            "The tokens of norm do not lie as the head expects: 17 patches",
        ),
    ],
)
def test_what_cannot_be_attached_is_refused_and_left_alone(build, arguments, error, sentence, projection):
    model = build()
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    with pytest.raises(error, match=sentence):
        attach_soap(model, projection, **arguments)
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks


def test_another_width_layout_architecture_or_kind_of_head_is_refused(model, vit, projection):
    with pytest.raises(HeadError, match="width 8, but those of layer -1 of vit have width 32"):
        attach_soap(model, random_projection(8))
    with pytest.raises(LayoutError, match="The tokens of layer -1 of vit do not lie as the head expects: 15 patches"):
        attach_soap(model, projection, layout=PatchLayout(prefix=2, stride=8))
    deeper = SOAPModelWrapper.from_backbone(ViTModel(ViTConfig(**VIT | {"num_hidden_layers": 3})), projection)
    with pytest.raises(HeadError, match="num_hidden_layers=3"):
        attach_soap(model, deeper)
    with pytest.raises(HeadError, match="not Tensor"):
        attach_soap(model, torch.eye(32))
    with pytest.raises(HeadError, match="clean already"):
        attach_soap(SOAPModelWrapper.from_backbone(vit, projection), projection)
    with pytest.raises(HeadError, match=r"no layer 5; it was fitted on \[-1\]"):
        attach_soap(model, SOAPModelWrapper.from_backbone(vit, projection), layer=5)


def test_one_of_several_layers_goes_to_a_named_module(pixels):
    model = PlainViT().eval()
    vit = HOSTS["plain module"].backbone(model)
    head = SOAPModelWrapper.from_backbone(vit, {1: random_projection(32), -1: random_projection(32)})
    with pytest.raises(HeadError, match=r"layers \[1, -1\]; choose the one of norm with layer="):
        attach_soap(model, head, "norm")
    raw = model.norm(torch.ones(1, 17, 32) * torch.arange(32.0))
    with attach_soap(model, head, "norm", layer=-1):
        clean = model.norm(torch.ones(1, 17, 32) * torch.arange(32.0))
    torch.testing.assert_close(clean[:, 1:], head.projections["-1"](raw[:, 1:]))


def test_a_head_that_removes_nothing_changes_nothing(model, pixels):
    bare = model(pixels).reconstruction
    with attach_soap(model, SOAPProjection.identity(32)):
        assert torch.equal(model(pixels).reconstruction, bare)


def test_what_a_model_adds_to_its_outputs_counts_as_computed():
    first, second = (BaseModelOutput(last_hidden_state=torch.zeros(1)) for _ in range(2))
    assert not depends(first, second, [])
    first.pooler_output, second.pooler_output = [torch.zeros(1)], [torch.ones(1)]
    assert depends(first, second, [])
