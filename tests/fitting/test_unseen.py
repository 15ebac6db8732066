"""A fit ends with a check on images that it has not seen, and may take its strength from matching."""

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModel

from soap_hf import fit_soap
from soap_hf.data.data_sets import open_dataset
from soap_hf.data.image_sample import ImageSample
from soap_hf.evaluation.examples import Examples
from soap_hf.fitting.arguments import FitArguments
from soap_hf.fitting.unseen import split_images
from soap_hf.heads.report import checks
from soap_hf.runtime.errors import DataError, HeadError
from tests.conftest import EXAMPLES, noise_image


def numbered(count: int) -> Dataset:
    """Images that tell their number by their colour."""
    return Dataset.from_dict({"image": [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(count)]})


def read(images: Examples | ImageSample) -> list[int]:
    def shade(example):
        return example.image.getpixel((0, 0))[0]

    if isinstance(images, Examples):
        return [number for part in images.measured(shade, list, 7) for number in part.value]
    return [number for batch in images.batches(shade, 7) for number in batch.values]


@pytest.mark.parametrize(
    ("count", "wanted", "mu", "fitted", "checked", "tuned"),
    [
        (200, 100, "auto", 100, 64, 0),
        (200, 180, "auto", 180, 20, 0),
        (100, 100, "auto", 80, 20, 0),
        (100, None, "auto", 80, 20, 0),
        (20, 1000, "auto", 20, 0, 0),
        (255, 80, "matching", 80, 64, 100),
        (250, 250, "matching", 200, 19, 31),
    ],
)
def test_parts_share_no_image(count, wanted, mu, fitted, checked, tuned):
    parts = split_images(numbered(count), FitArguments(num_images=wanted, mu=mu))
    fit, check, tune = (read(part) if part else [] for part in (parts.fitted, parts.checked, parts.tuned))
    assert (len(fit), len(check), len(tune)) == (fitted, checked, tuned)
    assert len({*fit, *check, *tune}) == fitted + checked + tuned


@pytest.mark.parametrize(
    ("count", "wanted", "fitted", "checked"), [(200, 100, 100, 64), (150, 1000, 86, 64), (20, 9, 9, 0)]
)
def test_parts_of_a_stream_share_no_image(count, wanted, fitted, checked):
    parts = split_images(numbered(count).to_iterable_dataset(), FitArguments(num_images=wanted))
    fit, check = (read(part) if part else [] for part in (parts.fitted, parts.checked))
    assert (len(fit), len(check)) == (fitted, checked)
    assert len({*fit, *check}) == fitted + checked


def test_what_is_set_aside_is_told(caplog):
    split_images(numbered(100), FitArguments(num_images=100))
    assert "The data set has 100 images: 80 are fitted on, and 20 are kept to check the head" in caplog.text


def test_without_a_check_all_are_fitted():
    parts = split_images(numbered(100), FitArguments(num_images=None, check=0))
    assert sorted(read(parts.fitted)) == list(range(100))
    assert parts.checked is parts.tuned is None


def test_a_whole_stream_is_read_but_for_what_is_kept():
    parts = split_images(numbered(200).to_iterable_dataset(), FitArguments(num_images=None))
    assert parts.checked is not None
    assert sorted(read(parts.fitted) + read(parts.checked)) == list(range(200))


def test_too_few_images_for_a_choice_are_refused():
    with pytest.raises(DataError, match=r'mu="matching" chooses on images .*: give at least 80 images'):
        split_images(numbered(60), FitArguments(num_images=60, mu="matching"))
    with pytest.raises(DataError, match="give a stream of at least 200 images"):
        split_images(numbered(60).to_iterable_dataset(), FitArguments(check=0, mu="matching"))


@pytest.mark.parametrize(("streaming", "needed"), [(False, "at least 40 images"), (True, "at least 128 images")])
def test_a_fit_that_cannot_be_checked_says_so(streaming, needed, caplog):
    images = numbered(30)
    parts = split_images(images.to_iterable_dataset() if streaming else images, FitArguments())
    assert parts.checked is None
    assert "Whether the head helps is not checked" in caplog.text
    assert needed in caplog.text


def test_what_is_kept_for_a_choice_is_called_so(caplog):
    split_images(numbered(100), FitArguments(check=0, mu="matching"))
    assert "20 are kept to choose its strength" in caplog.text


@pytest.fixture(scope="module")
def checked():
    """A head of the demo backbone, checked on 30 photographs."""
    photos = EXAMPLES / "photos"
    return fit_soap(EXAMPLES / "vit-mae-tiny", photos, num_images=98, progress=False)


def test_a_head_says_whether_it_helps(checked, tmp_path):
    (check,) = checked.config.checks
    assert check["images"] == 30
    assert check["unseen"]
    assert check["mean"] == pytest.approx(check["clean"] - check["raw"])
    assert check["low"] > 0
    checked.save_pretrained(tmp_path / "head")
    loaded = AutoModel.from_pretrained(tmp_path / "head")
    assert loaded.config.checks == [check]
    card = (tmp_path / "head" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"On 30 photographs that the fit did not see, matching rises from .*this head helps", card)
    assert card.index("this head helps") < card.index("## What is removed")
    assert "not seen by the fit" in card.partition("---\n")[2].partition("---\n")[0]
    (sentence,) = checks(loaded.config)
    assert sentence.endswith("this head helps.")


def test_another_strength_loses_the_check(checked, tmp_path):
    checked.save_pretrained(tmp_path / "head")
    loaded = AutoModel.from_pretrained(tmp_path / "head")
    loaded.reweight(loaded.config.mu)
    assert loaded.config.checks
    loaded.reweight(1.0)
    assert loaded.config.checks == []
    assert str(loaded.config.mu) == "1", "a whole number is written as one"
    loaded.save_pretrained(tmp_path / "head")
    card = (tmp_path / "head" / "README.md").read_text(encoding="utf-8")
    assert "model-index" not in card, "what was measured was measured at another strength"
    assert "not seen by the fit" not in card


def test_the_check_needs_no_second_fit(checked):
    """The statistics are those of the same images without a check."""
    photos = open_dataset(EXAMPLES / "photos")
    bare = fit_soap(EXAMPLES / "vit-mae-tiny", photos, num_images=98, check=0, progress=False)
    assert torch.equal(bare.statistics.scores, checked.statistics.scores)
    assert bare.config.checks == []


def test_a_fit_takes_its_strength_from_matching():
    model = fit_soap(EXAMPLES / "vit-mae-tiny", EXAMPLES / "photos", num_images=88, mu="matching", progress=False)
    assert model.config.fit["mu"] == "matching"
    assert model.config.mu == model.config.ranks[0] > 0
    assert model.config.checks[0]["unseen"]


def test_several_layers_are_checked_in_one_pass():
    photos = EXAMPLES / "photos"
    model = fit_soap(EXAMPLES / "vit-mae-tiny", photos, num_images=98, layer=[3, -1], check=10, progress=False)
    assert [check["images"] for check in model.config.checks] == [10, 10]
    assert [sentence.partition(":")[0] for sentence in checks(model.config)] == ["layer 3", "layer -1"]


def test_a_check_that_fails_does_not_cost_the_fit(vit, processor, caplog):
    images = Dataset.from_dict({"image": [noise_image(number, (9, 9)) for number in range(60)]})
    model = fit_soap(vit, images, num_images=40, image_processor=processor, image_size=128, progress=False)
    assert model.config.checks == []
    assert "The head is not checked: No photograph gives two views" in caplog.text


@pytest.mark.parametrize("checks", [[{"raw": 1}], "none", [{}, {}], [{"images": "many"}]])
def test_checks_of_the_wrong_kind_are_refused(checked, tmp_path, checks):
    checked.save_pretrained(tmp_path / "head")
    path = tmp_path / "head" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"checks": checks}), encoding="utf-8")
    with pytest.raises(HeadError, match="wrong kind"):
        AutoModel.from_pretrained(tmp_path / "head")


def test_the_command_chooses_by_matching(run):
    photos = EXAMPLES / "photos"
    options = ("--num-images", 88, "--mu", "matching", "--output", "head", "--no-figures")
    status, out, err = run("fit", EXAMPLES / "vit-mae-tiny", photos, *options)
    assert status == 0, err
    assert "matching within one patch" in out
    assert "this head helps" in " ".join(out.split())
    assert "--mu matching" in Path("head/README.md").read_text(encoding="utf-8")
