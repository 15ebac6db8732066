"""The command line does its work, or says in one sentence why not, before it begins and without leaving debris."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
import yaml
from datasets import Dataset, are_progress_bars_disabled, enable_progress_bars
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertModel

from soap_hf import SOAPModelWrapper
from soap_hf.cli.app import main
from soap_hf.layout.references import BackboneReference
from soap_hf.runtime.errors import BackboneError, HeadError
from tests.conftest import EXAMPLES, noise_image, random_projection

HEAD_FILES = [
    "README.md",
    "config.json",
    "figures",
    "model.safetensors",
    "preprocessor_config.json",
    "statistics.safetensors",
]

BAD_OPTIONS = {
    "--image-size 0": "'0' is no image size; give 224 or HEIGHTxWIDTH",
    "--image-size 7": "ViTModel cannot take images of 7 x 7 pixels",
    "--mu some": "'some' is neither a number nor",
    "--mu nan": "'nan' is neither a number nor",
    "--tau 0": "tau must be above 0, not 0",
    "--layer -2": "Invalid value for '--layer'",
    "--layer 9": "--layer 9 does not exist: the backbone has hidden states 0 to 2",
    "--num-images 1": "Invalid value for '--num-images'",
    "--nonsense": "No such option",
    "--image-column picture": "no column 'picture'; choose one of image, label",
    "--image-column label": "Column 'label' holds Value('int64'), not images",
    "--dtype float3": "float3",
}

BASIS, WEIGHTS = "projections.-1.basis", "projections.-1.weights"
BAD_HEADS = {
    "NaN": ({WEIGHTS: torch.tensor([1.0, torch.nan])}, "holds NaN or Inf"),
    "another width": ({BASIS: torch.eye(16, 2)}, "of shape (32, 2), but is torch.float32 of shape (16, 2)"),
    "another rank": ({BASIS: torch.eye(32, 3), WEIGHTS: torch.ones(3)}, "of shape (32, 2)"),
    "integers": ({WEIGHTS: torch.ones(2, dtype=torch.int64)}, "should be floating-point"),
    "a missing tensor": ({WEIGHTS: None}, f"missing: ['{WEIGHTS}']"),
    "an extra tensor": ({"more": torch.ones(1)}, "unexpected: ['more']"),
}

POOLED = """
from transformers import ViTModel
from transformers.modeling_outputs import BaseModelOutput
class PooledModel(ViTModel):
    def forward(self, pixel_values, **kwargs):
        return BaseModelOutput(super().forward(pixel_values, **kwargs).pooler_output)
"""


@pytest.fixture
def vit_folder(vit, processor, tmp_path):
    """The tiny ViT in a folder."""
    vit.save_pretrained(tmp_path / "vit")
    processor.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def data(tmp_path):
    """A data set of 70 images of noise, with labels, saved by `datasets`."""
    images = Dataset.from_dict({"image": [noise_image(seed) for seed in range(70)], "label": list(range(70))})
    images.save_to_disk(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def head(vit, tmp_path):
    """A head of the tiny ViT, made without a fit."""
    SOAPModelWrapper.from_backbone(vit, random_projection(32)).save_pretrained(tmp_path / "head")
    return tmp_path / "head"


def test_fit_info_and_score(run, mae_folder, photos, tmp_path):
    _, out, err = run("fit", mae_folder, photos, "--output", "head", "--num-images", 16, "--mu", 2)
    assert out.endswith("Head written to head\n")
    assert "Only 16 images" in err
    assert sorted(path.name for path in (tmp_path / "head").iterdir()) == HEAD_FILES
    model = AutoModel.from_pretrained(tmp_path / "head")
    assert model(torch.zeros(1, 3, 64, 64)).last_hidden_state.shape == (1, 65, 192)
    _, table, err = run("info", "head")
    assert table.count(" removed │") == model.config.ranks[0] == 2
    assert not err
    assert table in out, "the fit shows what info shows"
    for word in ("Directions removed: 2 of 192", "mu=2,", "16 images of fit", "64 x 64 pixels", "seed 0"):
        assert word in " ".join(table.split())
    written = sorted(tmp_path.rglob("head*"))
    _, scores, _ = run("score", mae_folder, photos, "--num-images", 16, "--mu", 2)
    assert scores.partition("Directions")[0] == table.partition("On 48 photographs")[0], "no head to be checked"
    assert sorted(tmp_path.rglob("head*")) == written


def test_quiet_says_nothing(run, vit_folder, data):
    enable_progress_bars()
    options = ("--num-images", 64, "--mu", 1, "--check", 0, "--quiet")
    assert run("fit", vit_folder, data, "--output", "head", *options) == (0, "", "")
    status, out, err = run("score", vit_folder, data, *options)
    assert (status, err) == (0, "")
    assert "std. error" in out, "a score without its table would say nothing at all"
    assert are_progress_bars_disabled(), "those of datasets, too"


def test_options_reach_the_fit(run, vit_folder, data, tmp_path):
    options = "--layer 1 --layer -1 --num-images 8 --num-synthetic 6 --image-size 32x48 --seed 3 --threshold 0.5"
    assert run("fit", vit_folder, data, "--output", "a/b", "--isotropic", *options.split())[0] == 0
    config = AutoModel.from_pretrained(tmp_path / "a" / "b").config
    assert config.layers == [1, -1]
    assert config.threshold == 0.5
    told = {"num_images": 8, "num_synthetic": 6, "image_size": [32, 48], "seed": 3, "isotropic": True}
    assert told.items() <= config.fit.items()


def test_no_arguments_show_the_help(run):
    assert all(command in run()[1] for command in ("fit", "score", "info"))


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.items(), ids=BAD_OPTIONS)
def test_bad_options_are_refused(options, message, refused, vit_folder, data):
    for command in (["fit", "--output", "head"], ["score"]):
        assert message in refused(*command, vit_folder, data, *options.split())


def test_what_is_not_there_is_refused(refused, vit_folder, data, tmp_path):
    assert "Missing argument 'DATASET'" in refused("fit", vit_folder)
    assert "No such command 'fitt'" in refused("fitt")
    assert "Backbone 'nobody/no-model' cannot be loaded" in refused("score", "nobody/no-model", data)
    assert "Data set 'nobody/no-set' cannot be opened" in refused("score", vit_folder, "nobody/no-set")
    assert "config.json of the head 'nobody/no-head' cannot be read" in refused("info", "nobody/no-head")
    (tmp_path / "few").mkdir()
    assert "holds no images, parquet or tar files" in refused("score", vit_folder, "few")
    noise_image(0).save(tmp_path / "few" / "only.png")
    assert "2 images are needed, but the data set has 1" in refused("score", vit_folder, "few")


def test_a_text_model_is_refused(refused, data, tmp_path):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(config).save_pretrained(tmp_path / "bert")
    assert "(bert) is not a vision backbone: its forward takes no pixels" in refused("score", "bert", data)


def test_pooled_features_are_refused(refused, vit, vit_folder, data):
    vit.config.auto_map = {"AutoModel": "modeling_pooled.PooledModel"}
    vit.config.save_pretrained(vit_folder)
    save_file(vit.state_dict(), vit_folder / "model.safetensors")
    (vit_folder / "modeling_pooled.py").write_text(POOLED)
    assert "holds no patch tokens" in refused("score", vit_folder, data, "--trust-remote-code")


def test_code_that_comes_with_a_backbone_is_named_and_not_run(refused, vit_folder, data):
    config = json.loads((vit_folder / "config.json").read_text())
    config |= {"model_type": "my-vit", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (vit_folder / "config.json").write_text(json.dumps(config))
    (vit_folder / "mine.py").write_text("raise SystemExit('it was run')")
    assert "read its code, then pass --trust-remote-code." in refused("score", vit_folder, data)


@pytest.mark.parametrize(("tensors", "message"), BAD_HEADS.values(), ids=BAD_HEADS)
def test_a_malformed_head_is_refused(tensors, message, head, refused):
    path = head / "model.safetensors"
    kept = {name: tensor for name, tensor in {**load_file(path), **tensors}.items() if tensor is not None}
    save_file(kept, path)
    assert message in refused("info", head)


def test_a_broken_file_of_a_head_is_refused(head, run, refused):
    assert "Directions removed: 2 of 32" in run("info", head)[1]
    (head / "model.safetensors").write_bytes(b"no safetensors")
    assert "cannot be read as safetensors" in refused("info", head)
    (head / "config.json").write_text("{")
    assert "cannot be read" in refused("info", head)
    (head / "config.json").write_text("{}")
    assert "is not a SOAP head" in refused("info", head)


def test_a_head_without_a_config_is_refused(head, refused):
    (head / "config.json").unlink()
    assert "holds no head, since it has no config.json" in refused("info", head)


def test_a_folder_that_is_not_empty_needs_overwrite(run, refused, vit_folder, data, tmp_path):
    (notes := tmp_path / "head" / "notes.txt").parent.mkdir()
    notes.write_text("mine")
    fit = ("fit", vit_folder, data, "--output", "head", "--num-images", 4, "--quiet")
    assert "is not empty; choose another folder or pass --overwrite" in refused(*fit)
    assert run(*fit, "--overwrite")[0] == 0
    assert {path.name for path in notes.parent.iterdir()} == {*HEAD_FILES, "notes.txt"}
    assert notes.read_text() == "mine"


def test_an_output_that_cannot_be_written_is_refused(refused, vit_folder, data, tmp_path):
    (tmp_path / "file").write_text("")
    assert "Cannot write" in refused("fit", vit_folder, data, "--output", "file/head")
    assert "is a file; choose a folder" in refused("fit", vit_folder, data, "--output", "file")


def break_images(folder, number):
    """Writes twelve images, the first few of them broken, and returns the names of those."""
    folder.mkdir()
    for seed in range(number, 12):
        noise_image(seed).save(folder / f"{seed}.png")
    for seed in range(number):
        (folder / f"{seed}.png").write_bytes(b"no image")
    return {f"{seed}.png" for seed in range(number)}


def test_unreadable_images_are_skipped_and_named(run, vit_folder, tmp_path):
    for number, options in ((1, []), (3, ["--max-bad-fraction", 0.25])):
        names = break_images(tmp_path / f"images{number}", number)
        _, out, err = run("score", vit_folder, f"images{number}", *options)
        assert f"{number} unreadable images were skipped" in err
        assert names <= {word.rpartition("/")[2] for word in err.split()}
        assert f"Fitted on {12 - number} images" in out


def test_too_many_unreadable_images_stop_the_run_and_are_named(refused, vit_folder, tmp_path):
    names = break_images(tmp_path / "images", 4)
    for options in ([], ["--max-bad-fraction", 0.25]):
        error = refused("score", vit_folder, "images", "--num-images", 12, "--quiet", *options)
        assert "Too many unreadable images (4 among" in error
        assert all(name in error for name in names)


def test_tokens_with_nan_stop_the_run_before_it_starts(refused, vit, vit_folder, data):
    vit.layernorm.weight.data.fill_(1e5)  # overflows in float16
    vit.save_pretrained(vit_folder)
    error = refused("score", vit_folder, data, "--dtype", "float16", "--num-images", 8, "--quiet")
    assert "The tokens of ViTModel hold NaN or Inf in float16: load the backbone with --dtype float32" in error


def test_debug_raises_instead(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["soap-hf", "info", "no-head", "--debug"])
    with pytest.raises(HeadError, match="no file or folder 'no-head'"):
        main()


def start(folder, *arguments, **options):
    """The command line in a process of its own, on one thread."""
    command = [sys.executable, "-m", "soap_hf", *map(str, arguments)]
    options |= {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, **options)


def files_below(folder):
    """Content of every file of a folder, by its path there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_run_leaves_nothing(vit_folder, data, tmp_path):
    before = sorted(tmp_path.iterdir())
    with start(tmp_path, "fit", vit_folder, data, "--output", "head", "--num-synthetic", 1_000_000) as process:
        said = b""
        while b"synthetic responses" not in said and (part := process.stderr.read1()):
            said += part
        process.kill()
    assert b"synthetic responses" in said
    assert process.returncode == -signal.SIGKILL
    assert sorted(tmp_path.iterdir()) == before


def test_a_failing_save_leaves_the_old_head_and_nothing_else(run, vit_folder, data, tmp_path):
    fit = ("fit", "vit", "data", "--num-images", 64, "--mu", 1, "--check", 0, "--quiet", "--output", "head")
    assert run(*fit) == (0, "", "")
    old = files_below(tmp_path / "head")
    before = sorted(tmp_path.iterdir())
    limit = len(old["statistics.safetensors"]) * 3 // 4  # the statistics, written last, exceed it
    full_disk = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    with start(tmp_path, *fit, "--overwrite", "--seed", 1, "--no-figures", preexec_fn=full_disk) as process:
        out, error = process.communicate()
    assert (process.returncode, out) == (1, b"")
    assert re.fullmatch(rb"Error: .+\n", error), error
    assert sorted(tmp_path.iterdir()) == before
    assert files_below(tmp_path / "head") == old


def test_a_backbones_folder_is_never_taken_for_the_head(refused, vit_folder, data):
    before = (vit_folder / "model.safetensors").read_bytes()
    assert "holds another model (vit)" in refused("fit", vit_folder, data, "--output", vit_folder, "--overwrite")
    assert (vit_folder / "model.safetensors").read_bytes() == before


DEMO_RECIPE = EXAMPLES.parent / "model_cards/vit-mae-tiny/recipe.yaml"
RECIPES = sorted(set((EXAMPLES.parent / "model_cards").glob("*/recipe.yaml")) - {DEMO_RECIPE})


@pytest.fixture
def asked(monkeypatch):
    """What a fit is asked for; it is not run."""
    calls = []

    def fit_soap(*arguments, **options):
        calls.append((arguments, options))
        raise BackboneError("not run")

    monkeypatch.setattr("soap_hf.fitting.fit.fit_soap", fit_soap)
    return calls


@pytest.mark.parametrize("recipe", RECIPES, ids=[path.parent.name for path in RECIPES])
def test_a_recipe_is_the_command_that_it_spells_out(recipe, asked, refused):
    values = yaml.safe_load(recipe.read_text())
    words = [values.pop("backbone"), values.pop("dataset")]
    for name, value in values.items():
        words += [f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)]
    refused("fit", "--recipe", recipe)
    refused("fit", *words)
    assert asked[0] == asked[1]
    assert asked[0][0] == tuple(words[:2])
    assert "Not run here yet" in recipe.with_name("README.md").read_text()


def test_every_backbone_of_the_paper_has_a_recipe():
    """MAE, iBOT, DINOv2, DINOv3, I-JEPA and CAPI, and the controls DINO and DeiT III."""
    backbones = " ".join(yaml.safe_load(path.read_text())["backbone"] for path in RECIPES)
    for name in ("vit-mae", "ibot", "dinov2", "dinov3", "ijepa", "capi", "dino-vitb16", "deit3"):
        assert name in backbones
    made = [BackboneReference.parse(name) for name in backbones.split() if ":" in name]
    assert [(single.kind, single.entry) for single in made] == [("torchhub", "capi_vitl14_lvd")]


def test_the_command_line_goes_before_the_recipe(asked, refused, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "backbone: a/b\ndataset: c/d\noutput: out\nlayer: [2, -1]\nimage_size: 64x32\nmu: 3\nstreaming: true\n"
    )
    refused("fit", "e/f", "--recipe", tmp_path / "recipe.yaml", "--mu", "4")
    (arguments, options), *_ = asked
    assert arguments == ("e/f", "c/d")
    expected = {"layer": [2, -1], "image_size": (64, 32), "mu": 4.0, "streaming": True, "num_images": 1000}
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_image: 3", "num_image"),
        ("- a", "no list of arguments"),
        ("a: [", "YAML"),
        ("\xff", "YAML"),
        ("", "no list"),
    ],
)
def test_recipes_that_cannot_be(asked, refused, tmp_path, text, words):
    (tmp_path / "recipe.yaml").write_bytes(text.encode("latin-1"))
    assert words in refused("fit", "--recipe", tmp_path / "recipe.yaml")
    assert asked == []


def test_the_demo_head_is_what_its_recipe_gives(run, tmp_path):
    """Up to the sign of a direction and to float32 on another processor."""
    demo = EXAMPLES / "soap-vit-mae-tiny"
    (tmp_path / "examples").symlink_to(EXAMPLES)
    status, _, err = run("fit", "--recipe", DEMO_RECIPE, "--output", "again", "--quiet")
    assert status == 0, err
    stored, again = (SOAPModelWrapper.from_pretrained(folder) for folder in (demo, tmp_path / "again"))
    projectors = [model.projections["-1"].matrix() for model in (stored, again)]
    torch.testing.assert_close(*projectors, atol=1e-3, rtol=0)
    assert stored.config.fit["num_images"] == again.config.fit["num_images"] == 64
