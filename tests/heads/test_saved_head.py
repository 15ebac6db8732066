"""A head comes back from its folder as it went in, on the backbone it belongs to, or not at all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    pipeline,
)

from soap_hf import SOAPConfig, SOAPModelWrapper, SOAPProjection, SOAPStatistics, fit_soap
from soap_hf.compat import AutoImageProcessor
from soap_hf.heads.opening import HeadRecord
from soap_hf.heads.report import print_report
from soap_hf.runtime.errors import BackboneError, DataError, HeadError, HubError, OutputError
from tests.conftest import noise_image, random_projection

HEAD_FILES = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "statistics.safetensors"}

REPLAY = """
import sys, torch, soap_hf
from transformers import AutoModel
pixels = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(AutoModel.from_pretrained(sys.argv[1])(pixels).last_hidden_state, sys.argv[3])
"""


@pytest.fixture
def backbone_folder(vit, processor, tmp_path):
    """The tiny ViT in a folder of its own."""
    vit.save_pretrained(tmp_path / "vit")
    processor.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def fitted(backbone_folder, images):
    """A head with three directions removed."""
    return fit_soap(backbone_folder, images, mu=3, num_images=20, progress=False)


@pytest.fixture
def head(fitted, tmp_path):
    """The same in a folder beside the backbone's."""
    fitted.save_pretrained(tmp_path / "head")
    return tmp_path / "head"


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 32, 32)


def edit_config(folder, **changes):
    """Rewrites values of a head's config."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_folder_holds_the_head_alone(head):
    assert {path.name for path in head.iterdir()} == HEAD_FILES
    assert set(load_file(head / "model.safetensors")) == {"projections.-1.basis", "projections.-1.weights"}


def test_saved_equals_loaded_bit_for_bit_in_another_process(head, fitted, pixels, tmp_path):
    torch.save(pixels, tmp_path / "pixels.pt")
    (tmp_path / "replay.py").write_text(REPLAY)
    arguments = [str(tmp_path / name) for name in ("replay.py", "head", "pixels.pt", "tokens.pt")]
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    with torch.no_grad():
        expected = fitted(pixels).last_hidden_state
    tokens = torch.load(tmp_path / "tokens.pt", weights_only=True)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)  # the other process has more threads
    loaded = AutoModel.from_pretrained(head)
    assert torch.equal(loaded(pixels).last_hidden_state, expected)
    for name, tensor in fitted.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_config_statistics_and_processor_come_back(head, fitted):
    loaded = AutoModel.from_pretrained(head)
    assert isinstance(loaded, SOAPModelWrapper)
    assert isinstance(AutoConfig.from_pretrained(head), SOAPConfig)
    ours, theirs = fitted.config.to_dict(), loaded.config.to_dict()
    for name in ("layers", "hidden_sizes", "ranks", "layouts", "mu", "tau", "threshold", "components", "fit"):
        assert theirs[name] == ours[name], name
    assert torch.equal(loaded.statistics.scores, fitted.statistics.scores)
    assert loaded.image_processor.to_dict() == AutoImageProcessor.from_pretrained(head).to_dict()
    assert not loaded.training


def test_reweighting_after_loading_equals_reweighting_before_saving(head, fitted):
    loaded = AutoModel.from_pretrained(head).reweight(mu=5)
    fitted.reweight(mu=5)
    assert torch.equal(loaded.projections["-1"].basis, fitted.projections["-1"].basis)
    assert torch.equal(loaded.projections["-1"].weights, fitted.projections["-1"].weights)


def test_statistics_are_read_when_asked_for_and_not_before(head):
    os.remove(head / "statistics.safetensors")
    loaded = AutoModel.from_pretrained(head)
    with pytest.raises(HeadError, match="saved without statistics"):
        _ = loaded.statistics


def test_several_layers_live_in_one_head(vit, images, processor, pixels, tmp_path):
    model = fit_soap(vit, images, layer=[1, -1], mu=2, num_images=16, image_processor=processor, progress=False)
    vit.save_pretrained(tmp_path / "vit")
    model.save_pretrained(tmp_path / "head")
    loaded = AutoModel.from_pretrained(tmp_path / "head", backbone=vit)
    assert set(loaded.statistics) == {1, -1}
    outputs, expected = loaded(pixels), model(pixels)
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(outputs.hidden_states[1], expected.hidden_states[1])


@pytest.mark.parametrize("place", ["head/backbone", "vit", "elsewhere/deep/vit"])
def test_the_backbone_is_found_again_inside_or_beside_the_head(fitted, pixels, tmp_path, place):
    """Inside or beside: head and backbone can be moved together. Elsewhere: the path is absolute."""
    (tmp_path / "a" / place).parent.mkdir(parents=True)
    fitted.backbone.save_pretrained(tmp_path / "a" / place)
    fitted.config.backbone_name_or_path = str(tmp_path / "a" / place)
    fitted.save_pretrained(tmp_path / "a" / "head")
    expected = fitted(pixels).last_hidden_state
    reference = json.loads((tmp_path / "a" / "head" / "config.json").read_text())["backbone_name_or_path"]
    assert reference.startswith(("./", "../"))
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "b" / "head")(pixels).last_hidden_state, expected)


def test_a_backbone_far_away_is_named_by_its_whole_path(fitted, backbone_folder, tmp_path):
    fitted.save_pretrained(tmp_path / "deep" / "down" / "head")
    config = json.loads((tmp_path / "deep" / "down" / "head" / "config.json").read_text())
    assert config["backbone_name_or_path"] == str(backbone_folder.resolve())


def test_include_backbone_makes_a_folder_that_needs_nothing_else(fitted, backbone_folder, pixels, tmp_path):
    expected = fitted(pixels).last_hidden_state
    fitted.save_pretrained(tmp_path / "whole", include_backbone=True)
    shutil.rmtree(backbone_folder)
    shutil.move(tmp_path / "whole", tmp_path / "moved")
    loaded = AutoModel.from_pretrained(tmp_path / "moved")
    assert torch.equal(loaded(pixels).last_hidden_state, expected)
    loaded.save_pretrained(tmp_path / "again", include_backbone=True)
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "again")(pixels).last_hidden_state, expected)


def test_included_mae_masks_again_when_loaded_alone(mae_folder, photos, tmp_path):
    model = fit_soap(mae_folder, photos, num_images=16, progress=False)
    model.save_pretrained(tmp_path / "whole", include_backbone=True)
    assert AutoConfig.from_pretrained(tmp_path / "whole" / "backbone").mask_ratio == 0.75


def test_pipeline_gives_the_clean_tokens(head, fitted):
    image = noise_image(3)
    tokens = torch.tensor(pipeline("image-feature-extraction", model=str(head))(image))
    expected = fitted(fitted.image_processor(image, return_tensors="pt")["pixel_values"]).last_hidden_state
    torch.testing.assert_close(tokens, expected, rtol=1e-6, atol=1e-6)


def test_loading_takes_another_copy_of_the_backbone(head, vit, backbone_folder, pixels):
    shutil.copytree(backbone_folder, backbone_folder.parent / "copy")
    shutil.rmtree(backbone_folder)
    by_path = AutoModel.from_pretrained(head, backbone=str(backbone_folder.parent / "copy"))
    live = AutoModel.from_pretrained(head, backbone=vit)
    assert live.backbone is vit
    assert torch.equal(by_path(pixels).last_hidden_state, live(pixels).last_hidden_state)


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"num_hidden_layers": 1}, {"patch_size": 4}])
def test_a_backbone_of_another_architecture_is_refused(head, vit, change):
    other = ViTModel(ViTConfig(**{**vit.config.to_dict(), **change}))
    with pytest.raises(HeadError, match=f"with {next(iter(change))}="):
        SOAPModelWrapper.from_pretrained(head, backbone=other)


def test_dtype_and_attention_reach_the_backbone(head):
    loaded = AutoModel.from_pretrained(head, dtype=torch.bfloat16, attn_implementation="eager")
    assert loaded.backbone.dtype == torch.bfloat16
    assert loaded.backbone.config._attn_implementation == "eager"
    assert loaded.projections["-1"].basis.dtype == torch.float32


def test_loading_info_and_device_map_are_understood(head):
    model, info = SOAPModelWrapper.from_pretrained(head, output_loading_info=True, device_map="cpu")
    assert not any(info.values())
    assert model.device.type == "cpu"


TENSORS = {
    "NaN": lambda basis, weights: {"projections.-1.basis": basis * torch.nan, "projections.-1.weights": weights},
    "missing": lambda basis, weights: {"projections.-1.basis": basis},
    "extra": lambda basis, weights: {"projections.-1.basis": basis, "projections.-1.weights": weights, "x": basis + 0},
    "shape": lambda basis, weights: {"projections.-1.basis": basis.T.contiguous(), "projections.-1.weights": weights},
    "integers": lambda basis, weights: {"projections.-1.basis": basis.int(), "projections.-1.weights": weights},
    "orthonormal": lambda basis, weights: {"projections.-1.basis": 2 * basis, "projections.-1.weights": weights},
    "[0, 1]": lambda basis, weights: {"projections.-1.basis": basis, "projections.-1.weights": weights + 1},
}


@pytest.mark.parametrize("fault", TENSORS)
def test_malformed_weights_are_refused(head, fault):
    save_file(TENSORS[fault](torch.eye(32)[:, :3].contiguous(), torch.ones(3)), head / "model.safetensors")
    with pytest.raises(HeadError):
        AutoModel.from_pretrained(head)


@pytest.mark.parametrize(
    "change",
    [
        {"ranks": [99]},
        {"ranks": [2, 3]},
        {"hidden_sizes": [1 << 40], "ranks": [1 << 40]},
        {"layers": [-1, -1]},
        {"layouts": [{"order": "diagonal"}]},
        {"tau": "wide"},
        {"head_format": 99},
        {"hidden_sizes": [], "ranks": [], "layouts": []},
    ],
)
def test_malformed_configs_are_refused(head, change):
    edit_config(head, **change)
    with pytest.raises(HeadError):
        SOAPModelWrapper.from_pretrained(head)


def test_what_is_no_head_is_refused(backbone_folder, head, tmp_path):
    with pytest.raises(HeadError, match="not a SOAP head"):
        SOAPModelWrapper.from_pretrained(backbone_folder)
    (tmp_path / "head" / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(HeadError, match="cannot be read as safetensors"):
        SOAPModelWrapper.from_pretrained(head)
    with pytest.raises(HeadError, match=r"config\.json"):
        SOAPModelWrapper.from_pretrained(tmp_path / "nowhere")


def test_a_backbone_that_lacks_weights_is_refused_but_a_missing_pooler_is_not_made_up(
    vit, images, processor, tmp_path
):
    vit.save_pretrained(tmp_path / "vit")
    weights = load_file(tmp_path / "vit" / "model.safetensors")
    without_pooler = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    save_file(without_pooler, tmp_path / "vit" / "model.safetensors", {"format": "pt"})
    model = fit_soap(str(tmp_path / "vit"), images, image_processor=processor, num_images=16, progress=False)
    assert model(torch.zeros(1, 3, 32, 32)).pooler_output is None
    without_layer = {name: tensor for name, tensor in weights.items() if ".0." not in name}
    save_file(without_layer, tmp_path / "vit" / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match="lacks weights"):
        fit_soap(str(tmp_path / "vit"), images, image_processor=processor, num_images=16, progress=False)


def test_a_trained_backbone_is_not_lost_silently(fitted, tmp_path, caplog):
    fitted.save_pretrained(tmp_path / "untouched")
    assert "loses that" not in caplog.text
    optimizer = torch.optim.SGD(fitted.backbone.parameters(), lr=0.1)
    fitted(torch.randn(1, 3, 32, 32)).last_hidden_state.sum().backward()
    optimizer.step()
    fitted.save_pretrained(tmp_path / "trained")
    assert "include_backbone=True" in caplog.text


def test_saving_onto_a_file_is_refused_and_leaves_it(fitted, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OutputError, match="Cannot write"):
        fitted.save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_failing_save_leaves_the_old_head_whole(head, fitted, pixels, monkeypatch):
    before = {path.name: path.read_bytes() for path in head.iterdir()}

    def fail(*arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(SOAPStatistics, "save", fail)
    fitted.reweight(mu=1)
    with pytest.raises(OutputError, match="no space left"):
        fitted.save_pretrained(head)
    assert {path.name: path.read_bytes() for path in head.iterdir()} == before
    assert [path.name for path in head.parent.iterdir() if path.name.startswith(".")] == []


def test_trainer_saves_and_resumes_a_head(vit, tmp_path):
    """A classifier on clean tokens: checkpoints hold the head, and a resumed run loads it again."""
    wrapper = SOAPModelWrapper.from_backbone(vit, random_projection(32))

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.soap, self.head = wrapper, torch.nn.Linear(32, 2)
            self.soap.requires_grad_(False)

        def forward(self, pixel_values, labels):
            logits = self.head(self.soap(pixel_values).last_hidden_state[:, 1:].mean(1))
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    model = Classifier()
    before = model.soap.projections["-1"].basis.clone()
    Trainer(model, arguments, train_dataset=rows).train()
    resumed = Trainer(Classifier(), arguments, train_dataset=rows)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2
    assert torch.equal(model.soap.projections["-1"].basis, before)


def test_task_checkpoint_serves_as_backbone(images, processor, tmp_path):
    """A checkpoint of a classifier loads as its base model, complete but for the classifier."""
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    task = ViTForImageClassification(config).eval()
    task.save_pretrained(tmp_path / "task")
    model = fit_soap(str(tmp_path / "task"), images, image_processor=processor, num_images=16, progress=False)
    pixels = torch.randn(1, 3, 32, 32)
    with model.disabled():
        assert torch.equal(model(pixels).last_hidden_state, task.vit(pixels).last_hidden_state)


def test_rank_zero_head_round_trips(vit, tmp_path, pixels):
    vit.save_pretrained(tmp_path / "vit")
    vit.config.name_or_path = str(tmp_path / "vit")
    SOAPModelWrapper.from_backbone(vit, SOAPProjection.identity(32)).save_pretrained(tmp_path / "head")
    loaded = AutoModel.from_pretrained(tmp_path / "head")
    assert torch.equal(loaded(pixels).last_hidden_state, vit(pixels).last_hidden_state)


def test_a_head_made_in_inference_mode_saves(vit, projection, tmp_path):
    with torch.inference_mode():
        made = ViTModel(vit.config)
        SOAPModelWrapper.from_backbone(made, projection).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_a_head_never_overwrites_a_backbone(backbone_folder, fitted):
    before = (backbone_folder / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="holds another model"):
        fitted.save_pretrained(backbone_folder)
    assert (backbone_folder / "model.safetensors").read_bytes() == before


def test_a_head_is_no_backbone(head, fitted, images):
    for candidate in (str(head), fitted):
        with pytest.raises(BackboneError, match="is a SOAP head"):
            fit_soap(candidate, images, progress=False)


def test_statistics_of_an_earlier_head_are_not_taken_for_a_later_ones(head, vit, backbone_folder):
    (head / "notes.md").write_text("mine")
    later = SOAPModelWrapper.from_backbone(vit, random_projection(32), name_or_path=str(backbone_folder))
    later.save_pretrained(head)
    with pytest.raises(HeadError, match="without statistics"):
        AutoModel.from_pretrained(head).reweight()
    assert (head / "notes.md").read_text() == "mine"


def test_a_failing_replacement_puts_the_old_head_back(head, fitted, monkeypatch):
    before = {path.name: path.read_bytes() for path in head.iterdir()}
    replace = Path.replace
    fitted.reweight(mu=1)
    names = []
    for number in range(1, 12):
        monkeypatch.setattr(Path, "replace", failing_at(replace, number))
        try:
            fitted.save_pretrained(head)
        except OutputError:
            names.append(number)
            assert {path.name: path.read_bytes() for path in head.iterdir()} == before
        else:
            break
    assert len(names) >= 6


def failing_at(replace, number):
    """A `Path.replace` that fails at one of its calls."""
    calls = []

    def fail(self, target):
        calls.append(self)
        if len(calls) == number:
            raise OSError("no space left on device")
        return replace(self, target)

    return fail


def test_a_relative_backbone_folder_is_remembered_by_its_whole_path(backbone_folder, images, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = fit_soap("vit", images, num_images=16, progress=False)
    assert model.config.backbone_name_or_path == str(backbone_folder)


def test_a_live_backbone_stays_in_the_mode_it_is_in(vit, head, images, processor):
    vit.train()
    vit.layers[0].eval()
    model = fit_soap(vit, images, image_processor=processor, num_images=16, progress=False)
    SOAPModelWrapper.from_pretrained(head, backbone=vit)
    assert vit.training
    assert model.training
    assert not vit.layers[0].training


def test_more_than_64_removed_components_can_be_reweighted(images, processor, tmp_path):
    wide = ViTModel(ViTConfig(hidden_size=80, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8))
    wide.save_pretrained(tmp_path / "wide")
    model = fit_soap(tmp_path / "wide", images, mu=70, num_images=40, image_processor=processor, progress=False)
    model.save_pretrained(tmp_path / "head")
    assert AutoModel.from_pretrained(tmp_path / "head").reweight(70).config.ranks == model.config.ranks


def test_a_head_on_a_local_backbone_is_not_pushed(fitted):
    with pytest.raises(HubError, match="backbone is local"):
        fitted.push_to_hub("me/head")


def test_a_broken_image_processor_is_not_replaced_silently(backbone_folder, images):
    (backbone_folder / "preprocessor_config.json").write_text("{broken")
    with pytest.raises(DataError, match=r"image processor .* cannot be read"):
        fit_soap(backbone_folder, images, progress=False)


def test_a_backbone_that_prefers_tuples_is_asked_for_names(vit, projection, pixels):
    vit.config.return_dict = False
    assert SOAPModelWrapper.from_backbone(vit, projection)(pixels).last_hidden_state.shape == (2, 17, 32)


def test_figures_are_saved_with_the_head_and_go_with_it(fitted, tmp_path):
    fitted.save_pretrained(tmp_path / "head", figures={"curve.png": b"picture"})
    assert (tmp_path / "head" / "figures" / "curve.png").read_bytes() == b"picture"
    fitted.save_pretrained(tmp_path / "head")
    assert {path.name for path in (tmp_path / "head").iterdir()} == HEAD_FILES


def test_a_failing_replacement_takes_the_folder_of_new_figures_away_again(head, fitted, monkeypatch):
    replace, names = Path.replace, sorted(path.name for path in head.iterdir())
    monkeypatch.setattr(Path, "replace", failing_at(replace, 7))  # a file of the head that comes after its figures
    with pytest.raises(OutputError):
        fitted.save_pretrained(head, figures={"curve.png": b"picture"})
    assert sorted(path.name for path in head.iterdir()) == names


def test_a_head_of_many_layers_made_by_hand_is_described(vit, tmp_path, capsys):
    projections = {layer: random_projection(32) for layer in (0, 1, 2, -1)}
    SOAPModelWrapper.from_backbone(vit, projections).save_pretrained(tmp_path / "head")
    print_report(HeadRecord.open(tmp_path / "head").config)
    assert "2 of 32, 2 of 32, 2 of 32, 2 of 32" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("trusted", ["", ", trust_remote_code=True"])
def test_without_the_import_transformers_says_what_to_write(head, trusted):
    code = f"from transformers import AutoModel; AutoModel.from_pretrained({str(head)!r}{trusted})"
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 1
    assert "the package soap-hf: write `import soap_hf` before you load this head" in done.stderr
    done = subprocess.run([sys.executable, "-c", f"import soap_hf; {code}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
