"""Heads under PEFT and the Trainer: adapters train beneath them, checkpoints come back, no loss goes unsaid."""

import copy
import logging
import shutil

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, Trainer, TrainingArguments, pipeline
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import logging as transformers_logging

from soap_hf import PatchLayout, SOAPModelWrapper, SOAPProjection, attach_soap, fit_soap
from soap_hf.heads.hub import Push, push_head
from soap_hf.runtime.errors import BackboneError, HubError, OutputError
from tests.attach.host_models import PlainViT
from tests.conftest import random_projection

peft = pytest.importorskip("peft")
adapters_of_transformers = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers' own add_adapter asks for peft {MIN_PEFT_VERSION}, and {peft.__version__} is installed",
)


@pytest.fixture
def said(caplog, monkeypatch):
    """What the package says, as a function."""
    monkeypatch.setattr(logging.getLogger("soap_hf"), "propagate", True)
    return lambda: caplog.text


@pytest.fixture
def pixels():
    return torch.randn(8, 3, 32, 32)


@pytest.fixture
def wrapper(vit, projection, tmp_path):
    """A head whose backbone is in a folder."""
    vit.save_pretrained(tmp_path / "vit")
    return SOAPModelWrapper.from_backbone(str(tmp_path / "vit"), projection)


def with_lora(model):
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )


def step(model, loss):
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss.backward()
    optimiser.step()


def test_lora_under_a_wrapper_trains_saves_and_comes_back(wrapper, pixels, tmp_path):
    tuned = with_lora(wrapper)
    before = [parameter.clone() for parameter in wrapper.projections.buffers()]
    step(tuned, tuned(pixel_values=pixels).last_hidden_state.square().mean())
    assert all(torch.equal(*pair) for pair in zip(wrapper.projections.buffers(), before, strict=True))
    tuned.save_pretrained(tmp_path / "adapter")
    wrapper.save_pretrained(tmp_path / "head")
    fresh = SOAPModelWrapper.from_backbone(str(tmp_path / "vit"), random_projection(32))
    fresh.projections["-1"].load_state_dict(wrapper.projections["-1"].state_dict())
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    with torch.no_grad():
        expected = tuned.eval()(pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(loaded.eval()(pixel_values=pixels).last_hidden_state, expected)
        raw = tuned(pixel_values=pixels, output_raw=True).raw_last_hidden_state
        torch.testing.assert_close(expected[:, 1:], wrapper.projections["-1"](raw[:, 1:]))


def clean(model, pixels):
    with torch.no_grad():
        return model.eval()(pixel_values=pixels).last_hidden_state


@pytest.mark.parametrize("way", ["get_peft_model", pytest.param("add_adapter", marks=adapters_of_transformers)])
@pytest.mark.parametrize("place", ["apart", "in the head's folder"])
def test_an_adapter_of_a_head_loads_as_one_of_any_model(way, place, wrapper, processor, pixels, tmp_path):
    wrapper.save_pretrained(tmp_path / "head")
    processor.save_pretrained(tmp_path / "head")
    head = SOAPModelWrapper.from_pretrained(tmp_path / "head")
    bare, lora = clean(head, pixels), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    folder = tmp_path / ("adapter" if place == "apart" else "head")
    if way == "add_adapter":
        head.add_adapter(lora)
        expected = clean(head, pixels)
        head.save_pretrained(folder)
    else:
        tuned = peft.get_peft_model(head, lora)
        expected = clean(tuned, pixels)
        tuned.save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").is_file()
    assert (folder / "model.safetensors").is_file() == (place != "apart")
    assert not torch.equal(bare, expected)
    for load in (AutoModel.from_pretrained, SOAPModelWrapper.from_pretrained):
        loaded = load(folder)
        assert isinstance(loaded, SOAPModelWrapper)
        torch.testing.assert_close(clean(loaded, pixels), expected)
    torch.testing.assert_close(clean(pipeline("image-feature-extraction", model=str(folder)).model, pixels), expected)


@adapters_of_transformers
def test_a_head_with_its_adapter_merged_needs_nothing_else(wrapper, pixels, tmp_path):
    wrapper.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    expected = clean(wrapper, pixels)
    wrapper.save_pretrained(tmp_path / "merged", include_backbone=True)
    shutil.rmtree(tmp_path / "vit")
    torch.testing.assert_close(clean(AutoModel.from_pretrained(tmp_path / "merged"), pixels), expected)
    torch.testing.assert_close(clean(wrapper, pixels), expected)


@adapters_of_transformers
def test_an_adapter_of_a_head_that_lies_nowhere_is_refused(wrapper, tmp_path):
    wrapper.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(OutputError, match="this head was never saved; save it before"):
        wrapper.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@adapters_of_transformers
def test_an_adapter_file_that_is_no_safetensors_is_not_opened(wrapper, tmp_path):
    wrapper.save_pretrained(tmp_path / "head")
    wrapper.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    wrapper.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(OSError, match="adapter_model"):
        AutoModel.from_pretrained(tmp_path / "adapter")


@adapters_of_transformers
def test_a_backbone_with_an_adapter_is_told_or_merged(
    wrapper, images, processor, pixels, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("soap_hf"), "propagate", True)
    backbone = AutoModel.from_pretrained(tmp_path / "vit")
    backbone.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model = fit_soap(backbone, images, image_processor=processor, mu=2, num_images=16, check=0, progress=False)
    model.save_pretrained(tmp_path / "alone")
    assert "The backbone carries an adapter: saving the head alone loses that" in caplog.text
    model.save_pretrained(tmp_path / "whole", include_backbone=True)
    loaded = SOAPModelWrapper.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(clean(loaded, pixels), clean(model, pixels))


def lora(*modules, **options):
    return peft.LoraConfig(r=2, target_modules=["q_proj", *modules], init_lora_weights=False, **options)


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def fitted(wrapper, processor, images, tmp_path):
    """A fitted head, saved in a folder."""
    processor.save_pretrained(tmp_path / "vit")
    fit_soap(tmp_path / "vit", images, mu=2, num_images=16, check=0, progress=False).save_pretrained(tmp_path / "head")
    return SOAPModelWrapper.from_pretrained(tmp_path / "head")


@adapters_of_transformers
@pytest.mark.parametrize("place", ["apart", "head", "third"])
@pytest.mark.parametrize("backbone", ["elsewhere", "included"])
def test_a_head_that_changes_under_its_adapter_is_saved_with_it(place, backbone, fitted, pixels, tmp_path, said):
    fitted.save_pretrained(tmp_path / "head", include_backbone=backbone == "included")
    fitted = SOAPModelWrapper.from_pretrained(tmp_path / "head")
    fitted.add_adapter(lora())
    fitted.save_pretrained(tmp_path / "apart")
    assert not (tmp_path / "apart" / "model.safetensors").exists()
    before = clean(fitted, pixels)
    loaded = AutoModel.from_pretrained(tmp_path / "apart").reweight(mu=3)
    expected = clean(loaded, pixels)
    assert not torch.allclose(before, expected)
    loaded.save_pretrained(tmp_path / place)
    for load in (AutoModel.from_pretrained, SOAPModelWrapper.from_pretrained):
        again = load(tmp_path / place)
        torch.testing.assert_close(clean(again, pixels), expected)
        assert again.config.mu == 3
        assert again.peft_config
    assert "loses" not in said()
    assert "fitted on" not in said()
    again.save_pretrained(tmp_path / "adapter alone")  # the head lies where the adapter says
    assert not (tmp_path / "adapter alone" / "model.safetensors").exists()
    torch.testing.assert_close(clean(AutoModel.from_pretrained(tmp_path / "adapter alone"), pixels), expected)


@adapters_of_transformers
@pytest.mark.parametrize("owner", ["head", "backbone"])
def test_a_disabled_adapter_is_not_merged(owner, fitted, processor, images, pixels, tmp_path, said):
    bare = clean(fitted, pixels)
    if owner == "head":
        fitted.add_adapter(lora(modules_to_save=["layernorm"]))
        assert not torch.allclose(clean(fitted, pixels), bare)
        fitted.disable_adapters()
    else:
        backbone = AutoModel.from_pretrained(tmp_path / "vit")
        backbone.add_adapter(lora())
        backbone.disable_adapters()
        fitted = SOAPModelWrapper.from_pretrained(tmp_path / "head", backbone=backbone)
        fitted = SOAPModelWrapper.from_backbone(backbone, fitted.projections["-1"])
        fitted.save_pretrained(tmp_path / "alone")
        assert "loses" not in said()
        torch.testing.assert_close(clean(AutoModel.from_pretrained(tmp_path / "alone"), pixels), bare)
    torch.testing.assert_close(clean(fitted, pixels), bare)
    fitted.save_pretrained(tmp_path / "whole", include_backbone=True)
    assert not any("lora" in name for name in load_file(tmp_path / "whole" / "backbone" / "model.safetensors"))
    torch.testing.assert_close(clean(AutoModel.from_pretrained(tmp_path / "whole"), pixels), bare)


@adapters_of_transformers
@pytest.mark.parametrize(
    ("options", "adapters"),
    [
        ({"modules_to_save": ["layernorm"]}, 1),
        ({"modules_to_save": ["layernorm"]}, 2),
        ({"use_dora": True}, 2),
        ({"bias": "lora_only"}, 1),
    ],
)
def test_adapters_of_every_kind_are_merged_as_they_compute(options, adapters, fitted, pixels, tmp_path):
    for number in range(adapters):
        fitted.add_adapter(lora("fc1", **options), f"number {number}")
    with torch.no_grad():
        for name, weight in fitted.named_parameters():
            if "lora" in name or "modules_to_save" in name or name.endswith("bias"):
                weight.add_(0.1 * torch.randn(weight.shape))
    fitted.set_adapter("number 0")
    expected = clean(fitted, pixels)
    fitted.save_pretrained(tmp_path / "whole", include_backbone=True)
    shutil.rmtree(tmp_path / "vit")
    torch.testing.assert_close(clean(AutoModel.from_pretrained(tmp_path / "whole"), pixels), expected)
    torch.testing.assert_close(clean(fitted, pixels), expected)


@adapters_of_transformers
def test_a_folder_with_an_adapter_takes_no_head_that_it_does_not_belong_to(fitted, pixels, tmp_path):
    fitted.add_adapter(lora())
    fitted.save_pretrained(tmp_path / "head")
    before = files(tmp_path / "head")
    with pytest.raises(OutputError, match=r"head holds an adapter, which would be put on the head too"):
        fitted.save_pretrained(tmp_path / "head", include_backbone=True)  # merged, it would count twice
    other = SOAPModelWrapper.from_backbone(str(tmp_path / "vit"), random_projection(32))
    with pytest.raises(OutputError, match=r"choose another folder, or remove its adapter_config\.json"):
        other.save_pretrained(tmp_path / "head")
    assert files(tmp_path / "head") == before


@adapters_of_transformers
def test_an_adapter_that_cannot_be_merged_is_refused(fitted, tmp_path, monkeypatch):
    fitted.add_adapter(lora())

    def merge(*_):
        raise NotImplementedError("not this kind.")

    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", merge)
    with pytest.raises(OutputError, match=r"q_proj of ViTModel cannot be merged \(not this kind\); save the adapter"):
        fitted.save_pretrained(tmp_path / "whole", include_backbone=True)
    assert not (tmp_path / "whole").exists()


@adapters_of_transformers
def test_a_head_is_pushed_without_an_adapter_only_by_name(fitted, tmp_path):
    fitted.add_adapter(lora())
    with pytest.raises(HubError, match="pass include_backbone=True to push it with its adapter merged, or push the"):
        fitted.push_to_hub("me/head", backbone_id="me/vit")
    fitted.save_pretrained(tmp_path / "head")
    with pytest.raises(HubError, match="head holds an adapter, without which heads are pushed: merge it"):
        push_head(tmp_path / "head", Push("me/head", backbone_id="me/vit"))


def test_a_peft_model_is_refused_with_the_way_out(vit, images):
    with pytest.raises(BackboneError, match=r"not PeftModel; give model\.merge_and_unload\(\)"):
        fit_soap(with_lora(vit), images, progress=False)


def test_a_head_goes_on_a_backbone_tuned_before(vit, projection, pixels):
    tuned = with_lora(vit).eval()
    with torch.no_grad():
        raw = tuned(pixel_values=pixels).last_hidden_state
        with attach_soap(tuned, projection):
            torch.testing.assert_close(tuned(pixel_values=pixels).last_hidden_state[:, 1:], projection(raw[:, 1:]))
        assert torch.equal(tuned(pixel_values=pixels).last_hidden_state, raw)


class Classifier(nn.Module):
    """A head with a classifier on its mean patch token."""

    def __init__(self, model):
        super().__init__()
        self.model, self.classifier = model, nn.Linear(32, 2)

    def forward(self, pixel_values, labels):
        logits = self.classifier(self.model(pixel_values, pooling="mean").image_embeds)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def examples(count=16):
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": i % 2} for i in range(count)]


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, save_strategy="steps", save_steps=2, report_to=[],
        use_cpu=True, disable_tqdm=True, learning_rate=0.05, seed=0, remove_unused_columns=False,
        dataloader_pin_memory=False, logging_strategy="no", **options,
    )  # fmt: skip


def frozen_classifier(wrapper):
    wrapper.backbone.requires_grad_(False)
    torch.manual_seed(1)
    return Classifier(wrapper)


def test_a_checkpoint_of_the_trainer_resumes_to_the_same_end(wrapper, tmp_path):
    model = frozen_classifier(wrapper)
    straight, resumed = copy.deepcopy(model), copy.deepcopy(model)
    Trainer(straight, arguments(tmp_path / "straight", max_steps=4), train_dataset=examples()).train()
    checkpoint = str(tmp_path / "straight" / "checkpoint-2")
    Trainer(resumed, arguments(tmp_path / "resumed", max_steps=4), train_dataset=examples()).train(checkpoint)
    assert not torch.equal(straight.classifier.weight, model.classifier.weight)
    for name, parameter in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], parameter)


class WrapperLoss(Trainer):
    """Trains the tokens of a wrapper itself, which the Trainer then saves as the head it is."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        inputs = dict(inputs)
        inputs.pop("labels")
        outputs = model(**inputs)
        loss = outputs.last_hidden_state.square().mean()
        return (loss, outputs) if return_outputs else loss


def test_a_wrapper_trained_by_itself_warns_that_its_checkpoints_hold_the_head_alone(wrapper, tmp_path, caplog):
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        WrapperLoss(wrapper, arguments(tmp_path / "run", max_steps=2), train_dataset=examples()).train()
    transformers_logging.disable_propagation()
    assert "pass include_backbone=True to keep it" in caplog.text
    wrapper.eval()
    pixels = torch.randn(2, 3, 32, 32)
    wrapper.save_pretrained(tmp_path / "whole", include_backbone=True)
    with torch.no_grad():
        loaded = AutoModel.from_pretrained(tmp_path / "whole")
        assert torch.equal(loaded(pixels).last_hidden_state, wrapper(pixels).last_hidden_state)


class Labelled(PlainViT):
    def forward(self, pixel_values, labels):
        logits = self.classifier(self.forward_tokens(pixel_values)[:, 1:].mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_under_an_attached_head_the_trainer_learns_nothing_along_what_is_removed(tmp_path):
    direction = torch.eye(32)[:, :1]
    model, example = Labelled(), {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    before = model.classifier.weight.clone()
    with attach_soap(
        model,
        SOAPProjection(direction, torch.ones(1)),
        "norm",
        layout=PatchLayout(prefix=1, stride=8),
        inputs=example,
    ):
        Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=examples()).train()
    assert not torch.equal(model.classifier.weight[:, 1], before[:, 1])
    assert torch.equal(model.classifier.weight[:, 0], before[:, 0])


def test_a_change_of_dtype_is_not_taken_for_training(wrapper, tmp_path, caplog):
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        wrapper.half().float().save_pretrained(tmp_path / "head")
        other = AutoModel.from_pretrained(tmp_path / "head")
        other.bfloat16().save_pretrained(tmp_path / "other")
    transformers_logging.disable_propagation()
    assert "loses that" not in caplog.text
