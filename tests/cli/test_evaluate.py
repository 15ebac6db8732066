"""The evaluations run from the command line, write what they found, and refuse bad input before the work."""

import csv
import json

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from PIL import Image

from soap_hf import SOAPModelWrapper, SOAPStatistics
from soap_hf.heads.card import refresh_card
from soap_hf.heads.running import read_raw_tokens
from tests.conftest import noise_image, random_projection
from tests.evaluation.test_knn import coloured
from tests.evaluation.test_segmentation import CHECKED, HALVES

METHODS = ("--method", "soap", "--method", "zero-image", "--method", "top-pc", "--rank", 1)


@pytest.fixture
def head(vit, processor, tmp_path):
    """A head of the tiny ViT, with statistics in which the leading component scores highest."""
    real, synthetic = torch.randn(2, 70, 4, 4, 32)
    for tokens in (real, synthetic):
        tokens[..., 0] += torch.tensor([-4.0, -4.0, 4.0, 4.0])
    statistics = SOAPStatistics.from_tokens(real, synthetic)
    vit.save_pretrained(tmp_path / "vit")
    model = SOAPModelWrapper.from_backbone(
        str(tmp_path / "vit"), random_projection(32), image_processor=processor, statistics=statistics
    )
    model.save_pretrained(tmp_path / "head")
    return tmp_path / "head"


@pytest.fixture
def colours(tmp_path):
    """Images of two colours in folders by split and class."""
    for split, number in (("train", 6), ("test", 3)):
        for place, row in enumerate(coloured(number, seed=number)):
            folder = tmp_path / "colours" / split / ("green" if row["label"] == 0 else "red")
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{place}.png")
    return tmp_path / "colours"


@pytest.fixture
def halves(tmp_path):
    """Images and masks in two folders, with a split to test on."""
    for split, dataset in (("train", HALVES), ("test", CHECKED)):
        for place, row in enumerate(dataset):
            for kind in ("image", "mask"):
                folder = tmp_path / f"{kind}s" / split
                folder.mkdir(parents=True, exist_ok=True)
                row[kind].save(folder / f"{place}.png")
    return tmp_path / "images", tmp_path / "masks"


@pytest.fixture
def photographs(tmp_path):
    """Twelve images of noise."""
    (tmp_path / "photographs").mkdir()
    for seed in range(12):
        noise_image(seed).save(tmp_path / "photographs" / f"{seed}.png")
    return tmp_path / "photographs"


def written(folder, name):
    """The rows and the summary in a folder of results."""
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.csv", "summary.json"]
    with open(folder / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file)), json.loads((folder / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["auto,1,3"], {"soap": 2, "soap mu=1": 1, "soap mu=3": 3}),
        (["auto", "1", "3"], {"soap": 2, "soap mu=1": 1, "soap mu=3": 3}),
        (["3, 0", "3.0"], {"soap": 2, "soap mu=3": 3, "soap mu=0": 0}),
    ],
)
def test_several_strengths_from_one_pass(run, head, photographs, tmp_path, monkeypatch, given, names):
    runs = []
    monkeypatch.setattr(
        "soap_hf.evaluation.comparison.read_raw_tokens",
        lambda *values: runs.append(len(values[1])) or read_raw_tokens(*values),
    )
    options = [word for one in given for word in ("--mu", one)]
    status, out, err = run("evaluate", "position", head, photographs, *options, "--output", "out", "--quiet")
    assert (status, err) == (0, "")
    assert sum(runs) == 12, "each image goes through the backbone once"
    rows, found = written(tmp_path / "out", "position")
    assert found["settings"]["ranks"] == {"raw": 0, **names}
    assert found["settings"]["mu"] == "auto"
    assert found["verdicts"].keys() == found["differences"].keys() == names.keys()
    assert all(f"{name}_share" in rows[0] for name in names)
    assert all(f" {name} " in out for name in names)
    if "soap mu=1" in names:  # the leading component is the position
        assert found["verdicts"]["soap mu=1"]["share"] == {"effect": "less position", "images_to_tell": None}


def test_strengths_join_the_methods_that_are_asked_for(run, head, photographs, tmp_path):
    options = (*METHODS[2:], "--mu", "2", "--output", "out", "--quiet")
    assert run("evaluate", "position", head, photographs, *options)[0] == 0
    assert list(written(tmp_path / "out", "position")[1]["means"]) == ["raw", "zero-image", "top-pc", "soap mu=2"]


def test_the_card_shows_the_heads_own_strength_beside_what_was_compared(run, head, photographs):
    output = head / "evaluation" / "position"
    options = ("--method", "soap", "--method", "top-pc", "--mu", 3, "--output", output, "--quiet")
    assert run("evaluate", "position", head, photographs, *options)[0] == 0
    means = json.loads((output / "summary.json").read_text(encoding="utf-8"))["means"]
    card = (head / "README.md").read_text(encoding="utf-8")
    lines = [line for line in card.splitlines() if line.startswith("| position |")]
    for method, own in means.items():
        told = [line for line in lines if f"| {method} |" in line]
        assert len(told) == (0 if method == "raw" else 3)
        assert all(any(f"{value:.3f}" in line for line in told) for value in own.values()) or method == "raw"
    measured = ModelCard(card).data.eval_results
    assert [round(one.metric_value, 6) for one in measured] == [round(one, 6) for one in means["soap"].values()]


def test_what_was_measured_at_another_strength_is_not_the_heads(run, head, photographs):
    output = head / "evaluation" / "position"
    assert run("evaluate", "position", head, photographs, "--output", output, "--quiet")[0] == 0
    found = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    for changed in ({"mu": 3}, {"method": "top-pc"}, {"ranks": {"soap": 1}}):
        other = {**found, "settings": {**found["settings"], **changed}}
        (output / "summary.json").write_text(json.dumps(other), encoding="utf-8")
        refresh_card(head)
        assert "| position |" not in (head / "README.md").read_text(encoding="utf-8")


def test_reweight(run, head, tmp_path):
    status, out, err = run("reweight", head, "--mu", 2, "--output", "two", "--no-figures")
    assert (status, "Making another head" in err) == (0, True)
    assert "Directions removed: 2 of 32 (mu=2, tau=0.05, threshold=0.75)." in out
    assert "`soap-hf evaluate matching two DATASET` says if it helps." in out
    wanted = SOAPModelWrapper.from_pretrained(head).reweight(2)
    made = SOAPModelWrapper.from_pretrained(tmp_path / "two")
    assert torch.equal(made.projections["-1"].matrix(), wanted.projections["-1"].matrix())
    options = ("--method", "top-pc", "--rank", 3, "--output", "two", "--overwrite", "--no-figures", "--quiet")
    assert run("reweight", head, *options) == (0, "", "")
    assert "Directions removed: 3 of 32 (top-pc: the principal" in run("info", tmp_path / "two")[1]
    again = run("reweight", "two", "--method", "soap", "--mu", "auto", "--output", "auto", "--no-figures", "--quiet")
    assert again == (0, "", "")
    assert SOAPModelWrapper.from_pretrained(tmp_path / "auto").config.method == "soap"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("", "--mu 2, or a baseline, such as --method top-pc --rank 4"),
        ("--rank 2", "--mu 2, or a baseline"),
        ("--mu 2 --rank 2", "--mu 2, or a baseline"),
        ("--mu -2", "mu=-2 is below 0"),
        ("--method top-pc --mu 2", "top-pc removes as many directions as --rank says; leave out --mu"),
        ("--method pca --rank 2", "no method 'pca'; choose from soap, zero-image, top-pc"),
        ("--method zero-image --rank 30", "pass a rank ≤ that"),
        ("--mu 2 --method soap --output vit", "holds another model"),
    ],
)
def test_what_no_head_can_be_made_of(refused, head, tmp_path, options, told):
    where = () if "--output" in options else ("--output", "new")
    assert told in refused("reweight", head, *options.split(), *where, "--overwrite")
    assert not (tmp_path / "new").exists()


def test_knn(run, head, colours, tmp_path):
    status, out, err = run(
        "evaluate", "knn", head, colours, "--k", 1, "--k", 3, *METHODS, "--output", "out", "--quiet"
    )
    assert (status, err) == (0, "")
    assert "Results written to out" in out
    rows, found = written(tmp_path / "out", "knn")
    assert sorted(row["image"] for row in rows)[0] == "green/0.png"
    assert {row["label"] for row in rows} == {"green", "red"}
    assert list(found["means"]) == ["raw", "soap", "zero-image", "top-pc"]
    assert found["means"]["raw"]["cls_mean_k3"] == sum(int(row["raw_cls_mean_k3"]) for row in rows) / len(rows) == 1
    assert found["counts"] == {"test_images": 6, "training_images": 12, "classes": 2, "bad_images": 0}
    assert found["settings"]["ranks"] == {"raw": 0, "soap": 2, "zero-image": 1, "top-pc": 1}
    assert found["command"].startswith("soap-hf evaluate knn ")
    assert "top-pc" in out


def test_segmentation(run, head, halves, tmp_path):
    status, out, _ = run("evaluate", "segmentation", head, *halves, *METHODS, "--k", 1, "--output", "out", "--quiet")
    assert status == 0
    rows, found = written(tmp_path / "out", "segmentation")
    assert [row["image"] for row in rows] == ["0.png", "1.png", "2.png"]
    assert found["means"]["raw"].keys() == {"accuracy_k1", "image_miou_k1", "miou_k1"}
    assert list(found["differences"]) == ["soap", "zero-image", "top-pc"]
    assert found["differences"]["soap"]["miou_k1"].keys() == {"mean", "low", "high"}
    assert "miou_k1" in out


def test_segmentation_of_columns_and_of_two_data_sets(run, head, halves, tmp_path):
    HALVES.save_to_disk(tmp_path / "train")
    CHECKED.rename_column("mask", "truth").save_to_disk(tmp_path / "test")
    options = ("--test-dataset", tmp_path / "test", "--k", 1, "--quiet")
    assert "no column 'mask'" in run("evaluate", "segmentation", head, tmp_path / "train", *options)[2]
    CHECKED.save_to_disk(tmp_path / "again")
    options = ("--test-dataset", tmp_path / "again", *options[2:])
    assert run("evaluate", "segmentation", head, tmp_path / "train", *options)[0] == 0
    images, masks = halves
    options = ("--test-dataset", images / "test", "--test-masks", masks / "test", *options[2:])
    assert run("evaluate", "segmentation", head, images / "train", masks / "train", *options)[0] == 0


def test_position(run, head, photographs, tmp_path):
    status, out, _ = run("evaluate", "position", head, photographs, *METHODS, "--output", "out", "--quiet")
    assert status == 0
    rows, found = written(tmp_path / "out", "position")
    assert len(rows) == found["counts"]["images"] == 12
    assert found["means"]["soap"].keys() == {"share", "row_r2", "column_r2"}
    mean = sum(float(row["top-pc_share"]) for row in rows) / 12
    assert found["means"]["top-pc"]["share"] == pytest.approx(mean)
    for word in ("share", "column_r2", "zero-image", "95 % interval"):
        assert word in out


def test_options_reach_the_evaluation(run, head, photographs, tmp_path):
    options = "--image-size 24x40 --num-images 7 --seed 3 --ridge 0.5 --layer -1 --batch-size 2"
    assert run("evaluate", "position", head, photographs, *options.split(), "--output", "out", "--quiet")[0] == 0
    rows, found = written(tmp_path / "out", "position")
    assert len(rows) == 7
    assert found["counts"]["positions"] == 3 * 5
    assert found["settings"]["image_size"] == [24, 40]
    assert found["settings"]["ridge"] == 0.5


def test_a_second_run_needs_leave_to_overwrite(run, refused, head, photographs, tmp_path):
    command = ("evaluate", "position", head, photographs, "--output", tmp_path / "out", "--quiet")
    assert run(*command)[0] == 0
    before = (tmp_path / "out" / "position.csv").read_text()
    assert "out is not empty; choose another folder or pass --overwrite" in refused(*command)
    assert run(*command, "--num-images", 5, "--overwrite")[0] == 0
    assert len((tmp_path / "out" / "position.csv").read_text()) < len(before)


def test_no_token_is_written_down(run, head, photographs, tmp_path):
    assert run("evaluate", "position", head, photographs, "--token", "hf_secret", "--output", "out", "--quiet")[0] == 0
    assert "hf_secret" not in (tmp_path / "out" / "summary.json").read_text()


REFUSALS = {
    "knn head colours": "Class 'green' has 6 training images, fewer than k = 20",
    "knn head colours --k 0": "Invalid value for '--k'",
    "knn head colours --test-split val": "no split 'val'; choose one of",
    "knn head colours --test-split train": "would be one split (train); choose two",
    "knn head photographs --test-dataset photographs": "no column 'label' of labels; choose one of image",
    "knn head single --test-dataset photographs": "2 images are needed, but the data set has 1",
    "knn head colours --method pca --k 1": "There is no method 'pca'",
    "knn nothing colours --k 1": "There is no file or folder 'nothing'",
    "segmentation head images orphans": "4 of 7 files have no mask of the same name (test/0.png",
    "segmentation head images photographs": "files have no mask of the same name",
    "segmentation head images": "no column 'mask'",
    "segmentation head images masks --k 100": "100 neighbours needs as many vectors, but there are 64",
    "position head photographs --layer 3": "This head has no layer 3",
    "position head photographs --ridge 0": "ridge of a probe must be positive",
    "position head photographs --device nowhere": "Device 'nowhere' cannot be used here",
    "position head photographs --output vit/config.json": "is a file; choose a folder",
    "position head photographs --num-images 1": "Invalid value for '--num-images'",
    "position head single": "2 images are needed, but the data set has 1",
}


@pytest.mark.parametrize("arguments", REFUSALS)
def test_bad_input_is_refused_in_one_sentence(arguments, refused, head, colours, halves, photographs, tmp_path):
    (tmp_path / "single").mkdir()
    noise_image(0).save(tmp_path / "single" / "0.png")
    (tmp_path / "orphans" / "train").mkdir(parents=True)
    for name in "012":
        Image.new("L", (32, 32)).save(tmp_path / "orphans" / "train" / f"{name}.png")
    assert REFUSALS[arguments] in refused("evaluate", *arguments.split(), "--quiet")


def test_a_class_folder_data_set_saved_by_datasets_works_too(run, head, colours, tmp_path):
    Dataset.from_dict({"image": [row["image"] for row in coloured(3)], "kind": list("aaabbb")}).save_to_disk(
        tmp_path / "set"
    )
    options = ("--test-dataset", tmp_path / "set", "--label-column", "kind", "--k", 1, "--quiet")
    assert run("evaluate", "knn", head, tmp_path / "set", *options)[0] == 0
