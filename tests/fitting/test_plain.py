"""A fit takes a module of any library, and its head comes back: live, by reference, in another process."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from soap_hf import SOAPModelWrapper, attach_soap, fit_soap
from soap_hf.compat import AutoImageProcessor
from soap_hf.heads.hub import Push, push_head
from soap_hf.runtime import modeling_soap
from soap_hf.runtime.errors import BackboneError, CheckpointError, HeadError, HubError, LayoutError, OutputError
from tests.conftest import ROOT, noise_image, random_projection
from tests.plain_modules import STYLES, CapiStyle, PlainMAE, RotaryViT, TimmStyle, build

QUIET = {"progress": False, "check": 0, "num_workers": 0}

HUBCONF = """
dependencies = ["torch"]

def tiny(seed=0):
    import torch
    from tests.plain_modules import DinoV2Style
    torch.manual_seed(seed)
    return DinoV2Style()

def nothing():
    return "no module"
"""

REPLAY = """
import sys, torch, soap_hf
from safetensors.torch import load_file, save_file
from soap_hf import SOAPModelWrapper
from transformers import AutoModel
from tests.plain_modules import build
torch.set_num_threads(1)
head, pixels = sys.argv[1], load_file(sys.argv[2])["pixels"]
with torch.no_grad():
    found = {
        "reference": AutoModel.from_pretrained(head, trust_remote_code=True)(pixels).last_hidden_state,
        "live": SOAPModelWrapper.from_pretrained(head, backbone=build("DINOv2's dict"))(pixels).last_hidden_state,
    }
save_file(found, sys.argv[3])
"""


@pytest.fixture
def small_images() -> Dataset:
    """24 images of noise, so that a fit takes a moment."""
    return Dataset.from_dict({"image": [noise_image(seed) for seed in range(24)]})


@pytest.fixture
def hub(tmp_path):
    """A local repository of torch.hub."""
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "hubconf.py").write_text(HUBCONF)
    return folder


def taken(model, pixels):
    with torch.no_grad():
        return model(pixels).last_hidden_state


@pytest.fixture(scope="module")
def demo_fits(mae_folder, photos):
    """Fits on the demo backbone, and on its modules called by hand."""
    processor = AutoImageProcessor.from_pretrained(mae_folder)
    how = {"image_processor": processor, "num_images": 48, **QUIET}
    return fit_soap(mae_folder, photos, **how), fit_soap(PlainMAE(mae_folder), photos, **how)


def test_a_plain_copy_is_fitted_as_the_transformers_model(demo_fits):
    ours, plain = demo_fits
    torch.testing.assert_close(plain.statistics.scores, ours.statistics.scores, rtol=0, atol=1e-6)
    assert plain.config.ranks[0] > 0
    matrices = (model.projections["-1"].matrix() for model in (plain, ours))
    torch.testing.assert_close(*matrices, rtol=0, atol=1e-5)
    assert plain.config.plain_backbone["num_hidden_layers"] == ours.config.backbone.num_hidden_layers


def test_its_head_goes_on_the_live_module_and_on_a_transformers_copy_alike(demo_fits, mae_folder, tmp_path):
    _, plain = demo_fits
    plain.save_pretrained(tmp_path / "head")
    pixels = torch.randn(2, 3, 64, 64)
    expected = taken(plain.eval(), pixels)
    copy = AutoModel.from_pretrained(mae_folder, dtype=torch.float32, mask_ratio=0.0)
    loaded = {
        "module": SOAPModelWrapper.from_pretrained(tmp_path / "head", backbone=PlainMAE(mae_folder).eval()),
        "transformers": SOAPModelWrapper.from_pretrained(tmp_path / "head", backbone=copy.eval()),
    }
    assert torch.equal(taken(loaded["module"], pixels), expected)
    torch.testing.assert_close(taken(loaded["transformers"], pixels), expected, rtol=0, atol=1e-5)
    live, found = PlainMAE(mae_folder).eval(), {}
    with torch.no_grad(), attach_soap(live, tmp_path / "head"):
        found["module"] = live(pixels)
    with torch.no_grad(), attach_soap(copy, tmp_path / "head"):
        found["transformers"] = copy(pixels, noise=torch.arange(64.0).expand(2, -1)).last_hidden_state
    assert torch.equal(found["module"], expected)
    torch.testing.assert_close(found["transformers"], expected, rtol=0, atol=1e-5)


def test_on_a_transformers_copy_it_is_a_head_of_transformers_from_then_on(demo_fits, mae_folder, tmp_path):
    _, plain = demo_fits
    plain.save_pretrained(tmp_path / "head")
    copy = AutoModel.from_pretrained(mae_folder, dtype=torch.float32).eval()
    SOAPModelWrapper.from_pretrained(tmp_path / "head", backbone=copy).save_pretrained(tmp_path / "there")
    pixels = torch.randn(1, 3, 64, 64)
    again = AutoModel.from_pretrained(tmp_path / "there")
    assert type(again.backbone).__name__ == "ViTMAEModel"
    torch.testing.assert_close(taken(again, pixels), taken(plain.eval(), pixels), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", STYLES)
def test_every_style_is_fitted_saved_loaded_and_attached(name, small_images, processor, tmp_path):
    module = build(name)
    model = fit_soap(module, small_images, image_processor=processor, mu=2, **QUIET)
    layout, style = model.layouts[-1], STYLES[name]
    assert (layout.prefix, layout.order, model.config.plain_backbone["tokens"]) == (
        style.prefix,
        style.order,
        style.source,
    )
    assert not any(part._forward_hooks for part in module.modules())
    model.save_pretrained(tmp_path / "head")
    pixels = torch.randn(2, 3, 32, 32)
    expected = taken(model, pixels)
    assert torch.equal(
        taken(SOAPModelWrapper.from_pretrained(tmp_path / "head", backbone=build(name)), pixels), expected
    )
    live = build(name)
    bare = SOAPModelWrapper.from_backbone(live, None, image_size=32)
    raw = taken(bare, pixels)
    with attach_soap(live, tmp_path / "head"):
        assert torch.equal(taken(bare, pixels), expected)
    assert torch.equal(taken(bare, pixels), raw)
    assert not torch.equal(raw, expected)


def test_by_path_by_key_and_by_function_the_tokens_are_the_same(processor, small_images):
    module = build("timm's VisionTransformer")
    how = {"image_processor": processor, "mu": 2, **QUIET}
    ways = {"norm": "norm", "function": module.forward_features, "found": None}
    scores = {name: fit_soap(module, small_images, tokens=way, **how).statistics.scores for name, way in ways.items()}
    assert torch.equal(scores["norm"], scores["found"])
    assert torch.equal(scores["function"], scores["found"])
    assert not torch.equal(fit_soap(module, small_images, tokens="blocks.0", **how).statistics.scores, scores["found"])


def test_a_head_by_reference_is_bit_identical_in_another_process(hub, small_images, processor, tmp_path, caplog):
    reference = f"torchhub:{hub}:tiny"
    how = {"image_processor": processor, "mu": 2, **QUIET}
    model = fit_soap(reference, small_images, trust_remote_code=True, **how)
    assert f"Running tiny() of {hub}/hubconf.py" in caplog.text
    model.save_pretrained(tmp_path / "head")
    pixels = torch.randn(2, 3, 40, 32)
    save_file({"pixels": pixels}, tmp_path / "pixels.safetensors")
    (tmp_path / "replay.py").write_text(REPLAY)
    files = (tmp_path / "head", tmp_path / "pixels.safetensors", tmp_path / "found.safetensors")
    done = subprocess.run([sys.executable, tmp_path / "replay.py", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = taken(model, pixels).contiguous()
    assert all(torch.equal(tokens, expected) for tokens in load_file(files[2]).values())


def test_code_runs_only_if_the_user_says_so(hub, small_images, processor, tmp_path):
    what = "read that code, then pass trust_remote_code=True"
    with pytest.raises(BackboneError, match=what):
        fit_soap(f"torchhub:{hub}:tiny", small_images, **QUIET)
    with pytest.raises(BackboneError, match=what):
        fit_soap("tests.plain_modules:TimmStyle", small_images, **QUIET)
    how = {"image_processor": processor, "mu": 2, "trust_remote_code": True, **QUIET}
    model = fit_soap("tests.plain_modules:TimmStyle", small_images, backbone_arguments={"dropout": 0.5}, **how)
    model.save_pretrained(tmp_path / "head")
    with pytest.raises(BackboneError, match=r"TimmStyle\(dropout=0.5\) of the module tests.plain_modules would run"):
        AutoModel.from_pretrained(tmp_path / "head")
    again = AutoModel.from_pretrained(tmp_path / "head", trust_remote_code=True)
    assert again.backbone.module.drop.p == 0.5
    assert not again.backbone.module.training


def test_bad_references_are_refused_in_one_sentence(hub, small_images, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def refuse(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    monkeypatch.setattr("soap_hf.layout.references.urlopen", refuse)
    for reference, what in {
        "torchhub:nobody/nothing:main:model": "cannot be made .*; check name, entry point and connection, or make",
        "torchhub:nobody:model": "is no reference to torch.hub",
        f"torchhub:{hub}:missing": "cannot be made .Cannot find callable missing",
        f"torchhub:{hub}:nothing": "gives a str, not a torch module",
        "no_such_package.models:vit": "cannot be made .No module named 'no_such_package'.*pass it as backbone",
    }.items():
        with pytest.raises(BackboneError, match=what):
            fit_soap(reference, small_images, trust_remote_code=True, **QUIET)
    with pytest.raises(BackboneError, match="made already"):
        fit_soap(RotaryViT(), small_images, backbone_arguments={"a": 1}, **QUIET)


def test_what_stands_at_a_branch_is_pinned_or_the_user_is_told(monkeypatch, hub, tmp_path, caplog):
    from soap_hf.layout.references import BackboneReference

    commit = "a" * 40
    reference = BackboneReference.parse("torchhub:owner/models:tiny")
    monkeypatch.setattr("soap_hf.layout.references._commit_on_github", lambda name, ref: None)
    assert reference.pinned() == reference
    assert "is not pinned" in caplog.text
    monkeypatch.setattr("soap_hf.layout.references._commit_on_github", lambda name, ref: commit)
    pinned = reference.pinned()
    assert str(pinned) == f"torchhub:owner/models:{commit}:tiny"
    assert BackboneReference.parse(str(pinned)) == BackboneReference.from_dict(pinned.to_dict()) == pinned
    # in the cache of torch.hub, it needs no network
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    cached = tmp_path / "torch" / "hub" / f"owner_models_{commit}"
    cached.parent.mkdir(parents=True)
    hub.rename(cached)
    caplog.clear()
    assert type(pinned.make(trust_remote_code=True)).__name__ == "DinoV2Style"
    assert f"hubconf.py in https://github.com/owner/models at commit {commit}" in caplog.text


def test_a_head_of_a_live_module_says_what_to_pass(small_images, processor, tmp_path):
    fit_soap(build("a map"), small_images, image_processor=processor, mu=2, **QUIET).save_pretrained(tmp_path / "head")
    with pytest.raises(HeadError, match=r"live module, tests.plain_modules.MapStyle of \d+ parameters: make that one"):
        AutoModel.from_pretrained(tmp_path / "head")
    for module, what in {
        "CAPI's tuple": r"do not lie as the head expects|width",
        "rotary positions and registers": "do not lie as the head expects",
    }.items():
        with pytest.raises(HeadError, match=what):
            SOAPModelWrapper.from_pretrained(tmp_path / "head", backbone=build(module), tokens="")


def test_depth_patch_size_and_width_are_checked(small_images, processor, tmp_path):
    rotary = RotaryViT().eval()
    fit_soap(rotary, small_images, image_processor=processor, mu=2, **QUIET).save_pretrained(tmp_path / "head")
    deeper, coarser, narrower = RotaryViT(), RotaryViT(), RotaryViT()
    deeper.layers.append(deeper.layers[0])
    coarser.embed = nn.Conv2d(3, 32, 16, stride=16)
    narrower.last = nn.Linear(32, 24)
    for module, what in ((deeper, "depth 2, but RotaryViT has 3"), (coarser, "patch size 8, but RotaryViT has 16"),
                         (narrower, "those of RotaryViT have width 24")):  # fmt: skip
        with pytest.raises(HeadError, match=what):
            SOAPModelWrapper.from_pretrained(tmp_path / "head", backbone=module)


def test_other_weights_are_said_and_the_backbone_is_not_saved_with_the_head(small_images, processor, tmp_path, caplog):
    model = fit_soap(RotaryViT().eval(), small_images, image_processor=processor, mu=2, **QUIET)
    model.save_pretrained(tmp_path / "head")
    caplog.clear()
    SOAPModelWrapper.from_pretrained(tmp_path / "head", backbone=RotaryViT())
    assert "are not those the head was fitted on" in caplog.text
    with pytest.raises(OutputError, match=r"a module of another library, tests.plain_modules.RotaryViT"):
        model.save_pretrained(tmp_path / "whole", include_backbone=True)
    assert not (tmp_path / "whole").exists()


def test_dropout_is_off_during_the_fit_and_on_again_after_it(small_images, processor):
    module = TimmStyle(dropout=0.9)
    module.train()
    module.blocks[1].eval()
    model = fit_soap(module, small_images, image_processor=processor, mu=2, **QUIET)
    quiet = fit_soap(module.eval(), small_images, image_processor=processor, mu=2, **QUIET)
    assert torch.equal(model.statistics.scores, quiet.statistics.scores)
    module.train()
    module.blocks[1].eval()
    modes = [part.training for part in module.modules()]
    fit_soap(module, small_images, image_processor=processor, mu=2, **QUIET)
    assert [part.training for part in module.modules()] == modes


class Pooled(RotaryViT):
    def forward(self, pixels):
        return RotaryViT.forward(self, pixels).mean(1)


class Twins(RotaryViT):
    def forward(self, pixels):
        tokens = RotaryViT.forward(self, pixels)
        return {"first": tokens, "second": tokens * 2}


class Unused(RotaryViT):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(32, 32)


BAD = {
    "pooled features": (
        Pooled,
        None,
        BackboneError,
        "forward gives .2, 32.*the path of the module that makes .*'last'",
    ),
    "pooled by path": (Pooled, "", BackboneError, "The output of Pooled is a tensor of shape"),
    "no such path": (RotaryViT, "blocks.3", BackboneError, "RotaryViT has no module or method 'blocks.3'"),
    "not called": (Unused, "spare", BackboneError, "'spare' is not called when Unused runs on pixels"),
    "no such key": (CapiStyle, ":7", BackboneError, "has no part '7'; its parts are 0, 1, 2"),
    "several": (Twins, None, BackboneError, "several tensors .*tokens=':first' .*tokens=':second'"),
    "fewer rows": (RotaryViT, lambda pixels: torch.zeros(1, 16, 32), BackboneError, "has 1 rows for"),
    "another number": (
        RotaryViT,
        lambda pixels: torch.zeros(len(pixels), 7, 32),
        LayoutError,
        "7 tokens for an image",
    ),
    "no tensor": (RotaryViT, lambda pixels: "tokens", BackboneError, "function of RotaryViT is str"),
    "no weights": (nn.Identity, None, BackboneError, "Identity has no weights"),
    "no source": (RotaryViT, 7, BackboneError, "tokens is the path of a module or a function of pixels, not int"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_modules_are_refused_before_anything_is_read(name, processor, monkeypatch):
    build_it, tokens, error, what = BAD[name]
    monkeypatch.setattr("soap_hf.fitting.fit.open_dataset", lambda *_, **__: pytest.fail("the data was opened"))
    with pytest.raises(error, match=what):
        fit_soap(build_it(), "nowhere", tokens=tokens, image_processor=processor, **QUIET)


def test_layers_of_a_module_are_chosen_by_their_path(processor):
    for layer in (1, [0, -1], "all"):
        with pytest.raises(BackboneError, match=r'instead of layer pass tokens="blocks.7"'):
            fit_soap(RotaryViT(), "nowhere", layer=layer, image_processor=processor, **QUIET)


def test_a_head_of_transformers_goes_on_a_plain_copy(demo_fits, mae_folder, tmp_path):
    ours, _ = demo_fits
    ours.save_pretrained(tmp_path / "head")
    pixels = torch.randn(1, 3, 64, 64)
    loaded = SOAPModelWrapper.from_pretrained(tmp_path / "head", backbone=PlainMAE(mae_folder).eval())
    torch.testing.assert_close(taken(loaded, pixels), taken(ours, pixels), rtol=0, atol=1e-5)
    loaded.save_pretrained(tmp_path / "there")
    with pytest.raises(HeadError, match=r"live module, tests.plain_modules.PlainMAE"):
        AutoModel.from_pretrained(tmp_path / "there")


def test_timms_settings_make_the_pixels_and_others_are_said(small_images, caplog):
    module = build("timm's VisionTransformer")
    model = fit_soap(module, small_images, mu=2, **QUIET)
    processor = model.image_processor
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (40, 32)
    assert list(processor.image_mean) == [0.5, 0.4, 0.3]
    assert "No image processor" not in caplog.text
    other = fit_soap(build("a map"), small_images, image_size=32, mean=(0.1, 0.2, 0.3), std=(1, 1, 2), mu=2, **QUIET)
    assert "ImageNet mean and std" in caplog.text
    assert list(other.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert list(other.image_processor.image_std) == [1, 1, 2]


def test_a_checkpoint_is_of_one_module_and_one_place_of_its_tokens(small_images, processor, tmp_path):
    how = {"image_processor": processor, "mu": 2, "batch_size": 4, "checkpoint": tmp_path / "fit.checkpoint", **QUIET}

    def stops(module):
        calls = []

        def stop(*_):
            calls.append(1)
            if len(calls) == 6:
                raise RuntimeError("it broke")

        return module.last.register_forward_hook(stop)

    module = build("rotary positions and registers")
    hook = stops(module)
    with pytest.raises(RuntimeError, match="it broke"):
        fit_soap(module, small_images, checkpoint_every=4, **how)
    hook.remove()
    with pytest.raises(CheckpointError, match="where its tokens are"):
        fit_soap(module, small_images, tokens="layers.1", resume=True, **how)
    resumed = fit_soap(module, small_images, resume=True, **how)
    del how["checkpoint"]
    whole = fit_soap(module, small_images, **how)
    torch.testing.assert_close(resumed.statistics.scores, whole.statistics.scores, rtol=0, atol=1e-9)


def test_a_head_is_put_on_by_hand_too(caplog):
    caplog.set_level(logging.WARNING)
    module = build("rotary positions and registers")
    model = SOAPModelWrapper.from_backbone(module, random_projection(32), image_size=32)
    pixels = torch.randn(1, 3, 24, 40)
    raw, clean = taken(SOAPModelWrapper.from_backbone(module, None, image_size=32), pixels), taken(model, pixels)
    assert torch.equal(raw[:, :4], clean[:, :4])
    assert not torch.equal(raw[:, 4:], clean[:, 4:])
    assert model.patch_tokens(pixels).shape == (1, 3, 5, 32)


def test_what_means_nothing_to_others_is_not_pushed(small_images, processor, hub, tmp_path):
    how = {"image_processor": processor, "mu": 2, **QUIET}
    live = fit_soap(RotaryViT(), small_images, **how)
    local = fit_soap(f"torchhub:{hub}:tiny", small_images, trust_remote_code=True, **how)
    for model in (live, local):
        with pytest.raises(HubError, match="The head's backbone is local"):
            model.push_to_hub("me/head")
        model.save_pretrained(tmp_path / "head")
        with pytest.raises(HubError, match="cannot go with it or be named by a hub id"):
            push_head(tmp_path / "head", Push("me/head", backbone_id="facebook/vit-mae-base"))


@pytest.mark.parametrize(
    "change",
    [
        {"reference": {"kind": "factory", "name": "os", "entry": "system('ls')"}},
        {"reference": {"kind": "spell"}},
        {"reference": {"kind": "live", "more": 1}},
        {"reference": "os:system"},
        {"image_size": "large"},
        {"image_size": [10**9, 10**9]},
        {"num_hidden_layers": "two"},
        {"architecture": None},
    ],
)
def test_a_config_from_a_stranger_that_says_nothing_is_refused(change, small_images, processor, tmp_path):
    model = SOAPModelWrapper.from_backbone(RotaryViT(), random_projection(32), image_size=32)
    model.save_pretrained(tmp_path / "head")
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    config["plain_backbone"].update(change)
    (tmp_path / "head" / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadError):
        AutoModel.from_pretrained(tmp_path / "head", trust_remote_code=True)


def test_the_code_beside_a_head_says_that_it_is_not_enough(tmp_path):
    model = SOAPModelWrapper.from_backbone(RotaryViT(), random_projection(32), image_size=32)
    model.save_pretrained(tmp_path / "head")
    with pytest.raises(HeadError, match=r"names no backbone of transformers; load it .*or with soap-hf"):
        modeling_soap.SOAPModelWrapper.from_pretrained(tmp_path / "head")
