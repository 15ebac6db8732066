"""Heads under PEFT and the Trainer: adapters train beneath them, checkpoints come back, no loss goes unsaid."""

import copy
import logging
import shutil

import pytest
import torch
from packaging.version import Version
from torch import nn
from transformers import AutoModel, Trainer, TrainingArguments, pipeline
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import logging as transformers_logging

from soap_hf import PatchLayout, SOAPModelWrapper, SOAPProjection, attach_soap, fit_soap
from soap_hf.runtime.errors import BackboneError, OutputError
from tests.attach.host_models import PlainViT
from tests.conftest import random_projection

peft = pytest.importorskip("peft")
adapters_of_transformers = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers' own add_adapter asks for peft {MIN_PEFT_VERSION}, and {peft.__version__} is installed",
)


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
