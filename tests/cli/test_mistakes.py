"""Mistakes of a first day at the command line: each is told in one sentence, in its own spelling, before the work."""

import logging
import re
import shutil

import pytest

from soap_hf import SOAPModelWrapper
from soap_hf.cli.spelling import OUT_OF_REACH, patience_in_a_word, spelled
from tests.conftest import noise_image, random_projection

FIT = "fit vit photos --output new"

MISTAKES = {
    "fit vit": "Missing argument 'DATASET'",
    "fit vit ./phtos --output new": "There is no file or folder './phtos'; did you mean './photos'?",
    "fit vit phtos --output new": "did you mean 'photos'?",
    "fit vit photos/trian --output new": "There is no file or folder 'photos/trian'; check the path.",
    "fit ./vti photos --output new": "There is no file or folder './vti'; did you mean './vit'?",
    "fit dinov2 photos --output new": "check the path, or give a hub id with its owner (owner/name)",
    "fit head photos --output new": "is a SOAP head, not a backbone; give the backbone that it was fitted on",
    "fit vit films --output new": "but 2 .mp4 (videos; save their frames as images), e.g. 'a.mp4'",
    "fit vit empty --output new": "holds no images, parquet or tar files, since it is empty",
    "fit vit note.txt --output new": "note.txt is a file but neither parquet nor tar",
    f"{FIT} --split test": "has no split 'test'; choose one of train",
    f"{FIT} --image-column picture": "choose one of image, label with --image-column.",
    f"{FIT} --mu -1": "mu=-1 is below 0, but it is a number of components; 0 removes nothing",
    f"{FIT} --dtype fp17": "give float32, bfloat16 or float16 (fp32, bf16, fp16)",
    f"{FIT} --device nowhere": "Device 'nowhere' cannot be used here",
    f"{FIT} --layer 40": "Error: --layer 40 does not exist: the backbone has hidden states 0 to 2",
    f"{FIT} --image-size 9999": "--image-size 9999x9999 is beyond 8192 pixels a side",
    f"{FIT} --tau 0": "Error: --tau must be above 0",
    f"{FIT} --num-image 10": "No such option: --num-image",
    f"{FIT} --recipe nope.yaml": "there is no file nope.yaml",
    f"{FIT} --push-to-hub me/head": "(--backbone-id) or push the backbone too (--include-backbone)",
    "fit vit photos --output head": "head is not empty; choose another folder or pass --overwrite",
    "fit some_module:make photos --output new": "read that code, then pass --trust-remote-code.",
    "tune haed photos": "There is no file or folder 'haed'; did you mean 'head'?",
    "tune photos head": "Folder photos holds no head, since it has no config.json",
    "evaluate knn head photos --test-dataset photos": "Class 'a' has 2 training images, fewer than k = 20",
    "evaluate knn head photos --test-dataset photos --num-train 2 --k 2": "in the sample of 2 of 4",
    "evaluate knn head plain --test-dataset plain": "--label-column, or put the images of each class into a folder",
    "evaluate saliency head photos": "no column 'mask'; choose one of image, label with --mask-column.",
    "evaluate matching head": "Matching needs one source: IMAGES, or --hpatches FOLDER, or --spair FOLDER",
    "evaluate matching vit photos": "is not a SOAP head",
    "evaluate matching lost photos": "move it back, or load the head in Python",
    "evaluate matching head photos --method pca": "There is no method 'pca'; choose from soap, zero-image, top-pc",
    "evaluate matching head photos --mu 1,two": "'two' is neither a number nor \"auto\"",
    "extract head photos --output f.csv": "a file that ends in .parquet or .safetensors, not 'f.csv'",
    "extract head photos --output f --pooling avg": "--pooling must be one of mean, cls, cls+mean or none, not 'avg'",
    "extract head photos --output f --every 2": "--every and --inside choose among patch tokens; pass --patches.",
    "extract head photos --output f --resume --overwrite": "--resume keeps what is there, and --overwrite replaces it",
    "figures head nope.jpg --output new": "Image nope.jpg (there is no such file) cannot be read",
    "info haed": "There is no file or folder 'haed'; did you mean 'head'?",
    "push haed me/head": "There is no file or folder 'haed'; did you mean 'head'?",
    "evalute matching": "No such command 'evalute'. Did you mean 'evaluate'?",
}


@pytest.fixture
def place(vit, processor, tmp_path):
    """A folder with a backbone, a head, one whose backbone has moved, and folders of images and of other things."""
    for folder in (tmp_path / "vit", tmp_path / "moved"):
        vit.save_pretrained(folder)
        processor.save_pretrained(folder)
    for head, backbone in (("head", "vit"), ("lost", "moved")):
        model = SOAPModelWrapper.from_backbone(str(tmp_path / backbone), random_projection(32))
        model.save_pretrained(tmp_path / head)
    shutil.rmtree(tmp_path / "moved")
    for folder in ("photos/a", "photos/b", "plain", "films", "empty"):
        (tmp_path / folder).mkdir(parents=True)
    for number, folder in enumerate(("photos/a", "photos/a", "photos/b", "photos/b", "plain", "plain")):
        noise_image(number).save(tmp_path / folder / f"{number}.png")
    for film in ("a.mp4", "b.mp4"):
        (tmp_path / "films" / film).write_bytes(b"film")
    (tmp_path / "note.txt").write_text("no image", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(("words", "told"), MISTAKES.items(), ids=list(MISTAKES))
def test_a_mistake_is_told_in_one_sentence(run, place, words, told):
    before = sorted(place.rglob("*"))
    status, out, err = run(*words.split())
    assert (status in (1, 2), out) == (True, "")
    *said, error = err.splitlines()
    assert error.startswith("Error: ")
    assert told in error
    assert "Traceback" not in err
    assert len(said) <= 3, said
    options = re.sub(r"mu=-1 is|(backbone=…)", "", error)
    assert not re.search(r"\w=(True|False|None|…|\d)|image_|num_|_column", options), "Python's spelling"
    left = {
        path
        for path in set(place.rglob("*")) - set(before)
        if path.parts[len(place.parts)] not in ("cache", "modules")
    }
    assert not left


def test_there_are_twenty():
    assert len(MISTAKES) >= 20


@pytest.mark.parametrize(
    ("message", "here"),
    [
        ("pass image_size=(3, 4) or 'image_size'.", "pass --image-size (3, 4) or 'image_size'."),
        ("my_image_size and image_sizes stay.", "my_image_size and image_sizes stay."),
        ("mu=auto finds none, and the mu is auto.", "--mu auto finds none, and the mu is auto."),
        ("mu must be finite.", "--mu must be finite."),
        ("Give it (--image-size, image_size=…).", "Give it (--image-size)."),
        ("Pass image_size=…, or mu=….", "Pass --image-size, or --mu."),
        ("dataset.image_size and image_size() stay.", "dataset.image_size and image_size() stay."),
    ],
)
def test_options_are_spelled_as_one_types_them(message, here):
    assert spelled(message, {"image_size": "--image-size", "mu": "--mu"}) == here


def test_that_the_hub_is_out_of_reach_is_said_once(caplog):
    logger = logging.getLogger("huggingface_hub.utils._http")
    with caplog.at_level(logging.WARNING, logger.name), patience_in_a_word():
        for number in range(1, 6):
            logger.warning(
                "'[Errno -2] Name or service not known' thrown while requesting HEAD https://huggingface.co/a"
            )
            logger.warning(f"Retrying in 1s [Retry {number}/5].")
        logger.warning("Something else.")
    assert [record.getMessage() for record in caplog.records] == [OUT_OF_REACH, "Something else."]
    logger.warning("Retrying in 1s [Retry 1/5].")
    assert caplog.messages[-1].startswith("Retrying"), "only within the block"
