"""The command line takes modules of other libraries by reference, and their heads everywhere."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from soap_hf import SOAPConfig, SOAPStatistics
from tests.conftest import ROOT

FACTORY = """
import torch
from tests.plain_modules import PlainMAE, RotaryViT

def rotary(seed=0):
    torch.manual_seed(seed)
    return RotaryViT()
"""
TRUST = "--trust-remote-code"
SMALL = ("--image-size", "32", "--device", "cpu")


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """An importable function that makes a module."""
    (tmp_path / "my_models.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_models:rotary"
    sys.modules.pop("my_models", None)


@pytest.fixture
def head(run, factory, photos):
    """A head of that module, written by the command line."""
    fit = ("fit", factory, photos, "--output", "head", "--num-images", 32, "--check", 8, "--mu", 2, *SMALL, TRUST)
    status, out, err = run(*fit, "--no-figures")
    assert status == 0, err
    assert "Head written to head" in out
    assert "Running rotary() of the module my_models" in err
    return "head"


def test_a_head_of_a_module_goes_through_every_command(run, head, photos, tmp_path):
    status, out, _ = run("info", head)
    assert status == 0
    assert "Backbone: my_models:rotary" in out
    images = ("--num-images", 4, TRUST, "--device", "cpu")
    for command in (
        ("evaluate", "matching", head, photos, "--output", "matching", *images),
        ("evaluate", "position", head, photos, "--output", "position", *images),
        ("tune", head, photos, *images),
        ("extract", head, photos, "--output", "features.safetensors", *images),
        ("figures", head, next(photos.rglob("*.jpg")), "--output", "drawn", TRUST, "--device", "cpu"),
    ):
        status, _, err = run(*command)
        assert status == 0, (command, err)
    assert (
        json.loads((tmp_path / "matching" / "summary.json").read_text())["settings"]["backbone"] == "my_models:rotary"
    )
    assert load_file(tmp_path / "features.safetensors")["features"].shape == (4, 32)
    card = (tmp_path / "head" / "README.md").read_text()
    assert "`my_models:rotary`" in card
    assert "soap-hf fit my_models:rotary" in card


def test_code_runs_only_with_the_flag(refused, head, factory, photos):
    what = "read that code, then pass --trust-remote-code"
    assert what in refused("fit", factory, photos, "--output", "other", *SMALL)
    assert what in refused("evaluate", "matching", head, photos, "--num-images", 4)


def test_arguments_tokens_and_colours_are_options(run, factory, photos, tmp_path):
    own = (
        "--backbone-arguments",
        '{"seed": 3}',
        "--tokens",
        "layers.1",
        "--mean",
        "0.5,0.5,0.5",
        "--std",
        "0.1,0.2,0.3",
    )
    options = ("--num-images", 16, "--check", 0, "--mu", 1, *SMALL, TRUST, "--no-figures")
    status, _, err = run("fit", factory, photos, "--output", "head", *own, *options)
    assert status == 0, err
    plain = SOAPConfig.from_pretrained(tmp_path / "head").plain_backbone
    assert plain["reference"]["arguments"] == {"seed": 3}
    assert plain["tokens"] == "layers.1"
    assert json.loads((tmp_path / "head" / "preprocessor_config.json").read_text())["image_std"] == [0.1, 0.2, 0.3]
    card = (tmp_path / "head" / "README.md").read_text()
    assert "--tokens layers.1" in card
    assert "--backbone-arguments '{\"seed\": 3}'" in card
    status, out, err = run("score", factory, photos, *own, "--num-images", 16, "--check", 0, *SMALL, TRUST)
    assert status == 0, err
    assert "Directions removed" in out


@pytest.mark.parametrize(
    ("option", "value", "what"),
    [
        ("--mean", "1,2", "is not a number for each of three channels"),
        ("--std", "0,1,1", "std must be positive"),
        ("--backbone-arguments", "[1]", "is no object of JSON"),
        ("--layer", "1", "instead of layer pass --tokens"),
    ],
)
def test_bad_options_are_refused(run, factory, photos, tmp_path, option, value, what):
    status, _, err = run("fit", factory, photos, "--output", "other", *SMALL, TRUST, option, value)
    assert status != 0
    assert what in err.splitlines()[-1]
    assert not (tmp_path / "other").exists()


def test_a_head_of_a_module_works_in_pipelines(head, photos):
    from transformers import pipeline

    extract = pipeline("image-feature-extraction", model=head, trust_remote_code=True)
    assert len(extract(str(next(photos.rglob("*.jpg"))))[0]) == 4 + 16


def test_two_processes_write_the_head_of_one(run, factory, photos, tmp_path):
    small = ("--num-images", "24", "--check", "0", "--mu", "2", *SMALL, TRUST, "--no-figures")
    fit = ("fit", factory, str(photos), *small)
    status, _, err = run(*fit, "--output", "one")
    assert status == 0, err
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [*launcher, "-m", "soap_hf", *fit, "--output", "two"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (SOAPStatistics.load(tmp_path / name / "statistics.safetensors") for name in ("one", "two"))
    assert one.num_real == two.num_real == 24
    assert (one.scores - two.scores).abs().max() < 1e-6
    matrices = [statistics.projection(mu=2).matrix() for statistics in (one, two)]
    assert (matrices[0] - matrices[1]).abs().max() < 1e-5
