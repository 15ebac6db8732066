"""A head knows the weights that it was fitted on, and no others are taken for them without a word."""

import copy
import io
import logging
import multiprocessing

import pytest
import torch
from datasets import Dataset
from transformers import AutoModel

from soap_hf import SOAPBackbone, SOAPModelWrapper, attach_soap, fit_soap
from soap_hf.runtime.vision_backbone import has_other_weights, weight_digests
from tests.conftest import EXAMPLES

OTHERS = "are not those the head was fitted on"


@pytest.fixture
def backbone_folder(vit, processor, tmp_path):
    vit.save_pretrained(tmp_path / "vit")
    processor.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def said(caplog, monkeypatch):
    """What the package says, as a function."""
    monkeypatch.setattr(logging.getLogger("soap_hf"), "propagate", True)
    return lambda: caplog.text


def fit(backbone, images):
    return fit_soap(backbone, images, mu=3, num_images=20, check=0, progress=False)


def changed(backbone):
    """The same model a small training step later."""
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.mul_(1.01)
    return backbone


def test_a_backbone_changed_before_the_fit_is_told_at_saving_and_at_loading(backbone_folder, images, tmp_path, said):
    model = fit(changed(AutoModel.from_pretrained(backbone_folder)), images)
    model.save_pretrained(tmp_path / "head")
    assert f"weights are not those of {backbone_folder}: saving the head alone loses that" in said()
    assert OTHERS not in said()
    AutoModel.from_pretrained(tmp_path / "head")
    assert OTHERS in said()


def test_a_changed_backbone_that_is_included_comes_back(backbone_folder, images, tmp_path, said):
    model = fit(changed(AutoModel.from_pretrained(backbone_folder)), images)
    model.save_pretrained(tmp_path / "head", include_backbone=True)
    loaded = AutoModel.from_pretrained(tmp_path / "head")
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(pixels).last_hidden_state, model.eval()(pixels).last_hidden_state)
    assert OTHERS not in said()
    assert "loses that" not in said()


def test_weights_that_change_in_the_folder_later_are_told(backbone_folder, images, tmp_path, said):
    fit(backbone_folder, images).save_pretrained(tmp_path / "head")
    changed(AutoModel.from_pretrained(backbone_folder)).save_pretrained(backbone_folder)
    SOAPModelWrapper.from_pretrained(tmp_path / "head")
    assert OTHERS in said()


def test_another_live_backbone_is_told_and_so_is_one_under_an_attached_head(backbone_folder, images, tmp_path, said):
    fit(backbone_folder, images).save_pretrained(tmp_path / "head")
    same = AutoModel.from_pretrained(backbone_folder)
    SOAPModelWrapper.from_pretrained(tmp_path / "head", backbone=same)
    attach_soap(same, tmp_path / "head").detach()
    assert OTHERS not in said()
    attach_soap(changed(same), tmp_path / "head")
    assert OTHERS in said()


@pytest.mark.parametrize("fitted", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("used", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_another_dtype_is_no_other_weights(fitted, used, stored, vit):
    file = vit.to(stored)
    digests = weight_digests(copy.deepcopy(file).to(fitted))
    assert not has_other_weights(weight_digests(copy.deepcopy(file).to(used)), digests)
    comparable = fitted == used or torch.float32 in (fitted, used)
    assert has_other_weights(weight_digests(changed(copy.deepcopy(file).float()).to(used)), digests) == comparable


def there_and_back(dtype):
    return lambda backbone: backbone.to(dtype).float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_were_rounded_once_are_no_others(dtype, vit):
    digests, rounded = weight_digests(vit), weight_digests(there_and_back(dtype)(copy.deepcopy(vit)))
    assert rounded != digests
    assert not has_other_weights(rounded, digests)
    assert not has_other_weights(digests, rounded)


def test_one_value_anywhere_that_changes_by_the_least_there_is_makes_other_weights(vit):
    digests, generator = weight_digests(vit), torch.Generator().manual_seed(0)
    weights = {name: weight for name, weight in vit.named_parameters() if not name.startswith("pooler.")}
    for name, weight in weights.items():
        values = weight.data.view(-1)
        for place in (0, -1, *torch.randint(len(values), (3,), generator=generator).tolist()):
            kept = values[place].clone()
            values[place] = torch.nextafter(kept, torch.tensor(9.0))
            assert has_other_weights(weight_digests(vit), digests), (name, place)
            values[place] = kept
    assert len(weights) > 10
    assert weight_digests(vit) == digests


def test_values_that_change_places_make_other_weights(vit):
    vit.wide = torch.nn.Linear(1024, 4)
    digests, weight = weight_digests(vit), vit.wide.weight.data
    for axis in (0, 1):
        weight.copy_(weight.roll(2, axis))
        assert has_other_weights(weight_digests(vit), digests)
        weight.copy_(weight.roll(-2, axis))
    assert weight_digests(vit) == digests


def test_statistics_of_a_batch_norm_count_as_weights(vit):
    vit.norm = torch.nn.BatchNorm1d(4)
    digests = weight_digests(vit)
    vit.norm.running_mean += 1
    assert has_other_weights(weight_digests(vit), digests)


def test_digests_do_not_depend_on_threads_or_on_where_weights_lie_in_memory(vit):
    digests, threads = weight_digests(vit), torch.get_num_threads()
    for weight in vit.parameters():  # at an odd place, and in another order
        wide = torch.empty(*weight.shape[:-1], weight.shape[-1] + 1)
        wide[..., 1:] = weight.data
        weight.data = wide[..., 1:]
    torch.set_num_threads(threads + 1)
    assert weight_digests(vit) == digests
    torch.set_num_threads(threads)


def test_a_pooler_that_the_checkpoint_lacks_is_no_weight(vit):
    digests = weight_digests(vit)
    vit.pooler = None
    assert weight_digests(vit) == digests


@pytest.mark.parametrize("known", [{}, {"float32": "0123456789abcdef", "float16": "0123456789abcdef"}])
def test_a_head_without_digests_or_with_those_of_a_few_values_is_taken_as_it_is(known, vit):
    assert not has_other_weights(weight_digests(vit), known)


def tokens(model: SOAPModelWrapper, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(pixels, output_hidden_states=True).last_hidden_state


@pytest.mark.parametrize("model_class", [SOAPModelWrapper, SOAPBackbone])
def test_a_head_goes_through_torch_save_and_to_other_processes(model_class):
    model, pixels = (
        model_class.from_pretrained(EXAMPLES / "soap-vit-mae-tiny", token="secret"),
        torch.randn(1, 3, 64, 64),
    )
    expected = model(pixels, output_hidden_states=True)[0]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert b"secret" not in buffer.getvalue()
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)  # what this test has written
    again = loaded(pixels, output_hidden_states=True)
    torch.testing.assert_close(again[0], expected)
    assert len(copy.deepcopy(model)(pixels, output_hidden_states=True).hidden_states) == len(again.hidden_states) == 7
    assert len(model(pixels, output_hidden_states=True).hidden_states) == 7


def test_a_head_works_in_a_pool_and_in_a_map_of_datasets():
    model, pixels = SOAPModelWrapper.from_pretrained(EXAMPLES / "soap-vit-mae-tiny"), torch.randn(1, 3, 64, 64)
    expected = tokens(model, pixels)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        torch.testing.assert_close(pool.apply(tokens, (model, pixels)), expected, rtol=0, atol=1e-5)
    mapped = Dataset.from_dict({"seed": [0]}).map(lambda row: {"sum": float(tokens(model, pixels).sum())})
    torch.set_num_threads(threads)
    assert mapped["sum"][0] == pytest.approx(float(expected.sum()), rel=1e-4)
