"""What counts as the data in a folder, and how names make splits, configs and classes."""

import os
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from datasets import Image as ImageFeature

from soap_hf.data.data_sets import open_dataset
from soap_hf.evaluation.examples import open_pairs
from soap_hf.runtime.errors import DataError
from tests.conftest import EXAMPLES, noise_image


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """Keeps what `datasets` prepares out of the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
---
"""


def draw(*paths: Path) -> None:
    """Images of noise at these paths, whatever their ending."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(len(path.name)).save(path, format="PNG")


def rows(number: int, first: int = 0) -> Dataset:
    values = {"image": [noise_image(seed) for seed in range(first, first + number)], "row": list(range(number))}
    return Dataset.from_dict(values).cast_column("image", ImageFeature())


def sizes(folder: Path) -> dict[str, int]:
    """How many images each split has, of those that a refusal names."""
    with pytest.raises(DataError, match="no split") as refused:
        open_dataset(folder, split="none such")
    splits = str(refused.value).partition("choose one of ")[2].rstrip(".").split(", ")
    return {split: len(open_dataset(folder, split=split)) for split in splits}


@pytest.mark.parametrize(
    "names",
    [
        ("train", "valid", "test"),
        ("training", "val", "testing"),
        ("Train", "Validation", "Test"),
        ("train2017", "val2017", "test_1"),
        ("TRAIN", "dev", "evaluation"),
        ("training_set", "val_set", "test_set"),
        ("seg_train", "seg_val", "seg_test"),
        ("images-train-1", "my dev images", "Test eval"),
    ],
)
@pytest.mark.parametrize("inside", [".", "data/images"])
def test_folders_named_as_splits_are_splits(names, inside, tmp_path):
    for number, name in enumerate(names, 1):
        draw(*(tmp_path / inside / name / kind / f"{seed}.png" for kind in "ab" for seed in range(number)))
    assert sizes(tmp_path) == {"train": 2, "validation": 4, "test": 6}
    opened = open_dataset(tmp_path, split="val")
    assert opened.features["label"].names == ["a", "b"]
    assert len(open_dataset(tmp_path)) == 2, "train is the default"


def test_splits_within_classes_keep_the_classes(tmp_path):
    for kind in ("cats", "dogs"):
        draw(*(tmp_path / kind / "train" / f"{seed}.png" for seed in range(3)))
        draw(*(tmp_path / kind / "test" / f"{seed}.png" for seed in range(2)))
    assert sizes(tmp_path) == {"train": 6, "test": 4}
    for split in ("train", "test"):
        opened = open_dataset(tmp_path, split=split)
        assert opened.features["label"].names == ["cats", "dogs"]
        paths = opened.cast_column("image", ImageFeature(decode=False))["image"]
        assert all(("cats", "dogs")[label] in file["path"] for label, file in zip(opened["label"], paths, strict=True))


def test_a_folder_that_holds_a_split_is_no_class(tmp_path):
    for split in ("train", "test"):  # as Kaggle packs them
        draw(*(tmp_path / f"seg_{split}" / f"seg_{split}" / kind / f"{split}.png" for kind in ("sea", "street")))
    draw(*(tmp_path / "two" / part / split / "1.png" for part, split in (("left", "train"), ("right", "test"))))
    assert open_dataset(tmp_path / "two").column_names == ["image"]
    shutil.rmtree(tmp_path / "two")
    assert open_dataset(tmp_path, split="test").features["label"].names == ["sea", "street"]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("seg_train", "seg_test", "seg_pred"), r"\(seg_test, seg_train\) and in others \(seg_pred\)"),
        (("cats/train", "cats/test", "dogs"), r"\(cats/test, cats/train\) and in others \(dogs\)"),
        (("cats/train", "cats/test", "cats/more"), r"\(test, train\) and in others \(more\)"),
        (("2019", "2020", "2021/test"), r"\(2021/test\) and in others \(2019, 2020\)"),
        (("a/test", "a", "b/test", "b", "."), r"\(a/test, b/test\) and in others \(\., a, b\)"),
    ],
)
def test_splits_beside_what_is_none_are_asked_about(names, told, tmp_path):
    draw(*(tmp_path / name / f"{seed}.png" for name in names for seed in range(2)))
    with pytest.raises(DataError, match=told):
        open_dataset(tmp_path)
    assert len(open_dataset(tmp_path, split="test")) == (4 if "b" in names else 2)


def test_a_word_in_one_class_makes_no_split(tmp_path, caplog):
    draw(*(tmp_path / name / "1.png" for name in ("bus", "car", "train_station")))
    assert open_dataset(tmp_path).features["label"].names == ["bus", "car", "train_station"]
    assert "Folder 'train_station' is a class and no split, as others lie beside it." in caplog.text
    draw(*(tmp_path / "more" / name / "1.png" for name in ("plane", "train")))
    assert open_dataset(tmp_path).features["label"].names == ["bus", "car", "more", "train_station"]


def test_a_stray_picture_beside_splits_makes_no_classes(tmp_path, caplog):
    draw(tmp_path / "train" / "1.png", tmp_path / "test" / "2.png", tmp_path / "preview.png")
    assert sizes(tmp_path) == {"train": 1, "test": 1}
    assert open_dataset(tmp_path).column_names == ["image"]
    assert "1 .png outside the splits, e.g. 'preview.png'" in caplog.text


def test_a_class_named_as_a_split_is_asked_about(tmp_path):
    draw(*(tmp_path / name / "1.png" for name in ("bus", "car", "train")))
    with pytest.raises(DataError, match=r"named as splits \(train\) and in others \(bus, car\); choose a split"):
        open_dataset(tmp_path)
    assert len(open_dataset(tmp_path, split="train")) == 1
    (tmp_path / "train").rename(tmp_path / "train_station")
    assert open_dataset(tmp_path).features["label"].names == ["bus", "car", "train_station"]


@pytest.mark.parametrize("card", [None, CARD])
@pytest.mark.parametrize("name", ["set", "run[12] (*)", "[D] data", "a::b", "$HOME", "~"])
def test_splits_of_parquet_files_are_those_of_datasets(card, name, tmp_path):
    folder = tmp_path / "plain"
    (folder / "data").mkdir(parents=True)
    rows(4).to_parquet(folder / "data" / "train-00000-of-00002.parquet")
    rows(2).to_parquet(folder / "data" / "train-00001-of-00002.parquet")
    rows(3).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    (tmp_path / "run1").mkdir()
    rows(1).to_parquet(tmp_path / "run1" / "train-00000-of-00001.parquet")
    if card:
        (folder / "README.md").write_text(card)
    folder = folder.rename(tmp_path / name)
    assert sizes(folder) == {"train": 6, "test": 3}
    assert len(list(open_dataset(folder, split="test", streaming=True))) == 3


def test_configs_are_those_of_the_card(tmp_path):
    for name, number in (("small", 2), ("large", 5)):
        (tmp_path / name).mkdir()
        rows(number).to_parquet(tmp_path / name / "train.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_dir: small\n- config_name: large\n  data_dir: large\n---\n"
    )
    assert len(open_dataset(tmp_path, config_name="small")) == 2
    assert len(open_dataset(tmp_path, config_name="large")) == 5
    with pytest.raises(DataError, match="has no config 'huge'; choose one of small, large with config_name"):
        open_dataset(tmp_path, config_name="huge")
    with pytest.raises(DataError, match="several configs; choose one of small, large"):
        open_dataset(tmp_path)
    (tmp_path / "README.md").unlink()
    with pytest.raises(DataError, match="has no configs"):
        open_dataset(tmp_path, config_name="small")


def test_a_config_of_a_file_that_has_none_is_refused(tmp_path):
    rows(2).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no config 'x'"):
        open_dataset(tmp_path / "a.parquet", config_name="x")


@pytest.mark.parametrize("names", [("a.parquet", "b.parquet"), ("train/0.parquet", "test/0.parquet")])
def test_parquet_files_of_other_columns_are_refused_by_name(names, tmp_path):
    for name, data in zip(names, (rows(2), rows(2).rename_column("row", "id")), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data.to_parquet(tmp_path / name)
    with pytest.raises(DataError) as refused:
        open_dataset(tmp_path)
    assert all(str(tmp_path / name) in str(refused.value) for name in names)
    assert "different columns (image, id; image, row)" in str(refused.value) or "(image, row; image, id)" in str(
        refused.value
    )


def test_parquet_files_of_columns_that_do_not_fit_are_refused_in_one_sentence(tmp_path):
    rows(2).to_parquet(tmp_path / "a.parquet")
    words = Dataset.from_dict({"image": rows(2)["image"][:], "row": ["one", "two"]})
    words.cast_column("image", ImageFeature()).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"cannot be read \(.+\); mend its files"):
        open_dataset(tmp_path)


def test_a_folder_of_data_is_read_by_a_relative_path_too(tmp_path, monkeypatch, caplog):
    (tmp_path / "set").mkdir()
    rows(4).to_parquet(tmp_path / "set" / "images.PARQUET")
    (tmp_path / "set" / "train.csv").write_text("a,b\n1,2\n")
    monkeypatch.chdir(tmp_path)
    assert len(open_dataset("set")) == len(open_dataset("set/images.PARQUET")) == 4
    monkeypatch.chdir(tmp_path / "set")
    assert len(open_dataset(".")) == 4
    assert not caplog.messages
    rows(3).to_parquet("test.parquet")
    rows(2).to_parquet("train-0.parquet")
    assert sizes(Path(".")) == {"train": 2, "test": 3}
    assert "1 file is passed over: 1 .parquet outside the splits, e.g. 'images.PARQUET'" in caplog.text


@pytest.mark.parametrize("assets", ["assets", "test"])
def test_pictures_beside_parquet_files_are_not_the_data(assets, tmp_path, caplog):
    rows(6).to_parquet(tmp_path / "birds.parquet")
    draw(tmp_path / assets / "one.png", tmp_path / assets / "two.png")
    opened = open_dataset(tmp_path)
    assert opened["row"][:] == list(range(6))
    assert "2 files are passed over" in caplog.text


def test_as_many_pictures_as_rows_are_asked_about(tmp_path):
    rows(2).to_parquet(tmp_path / "features.parquet")
    draw(*(tmp_path / f"{seed}.png" for seed in range(3)))
    with pytest.raises(DataError, match="holds 3 images and parquet files of 2 rows; give the folder of the ones or"):
        open_dataset(tmp_path)


def test_a_head_in_the_folder_is_not_data(tmp_path):
    draw(*(tmp_path / f"{seed}.png" for seed in range(3)))
    shutil.copytree(EXAMPLES / "soap-vit-mae-tiny", tmp_path / "my head")
    assert list((tmp_path / "my head").rglob("*.png")), "it has pictures of its own"
    assert len(open_dataset(tmp_path)) == 3


def test_hidden_and_system_files_are_not_data(tmp_path, caplog):
    draw(*(tmp_path / kind / f"{seed}.png" for kind in ("crane", "ibis") for seed in range(2)))
    for name in ("crane/._1.png", "__MACOSX/crane/1.png", ".ipynb_checkpoints/1.png", "Thumbs.db"):
        draw(tmp_path / name)
    for name in ("@eaDir/1.png", "#recycle/1.png", "crane/@__thumb/1.png", "_gsdata_/1.png", "@Recycle/2.png"):
        draw(tmp_path / name)
    opened = open_dataset(tmp_path)
    assert (len(opened), opened.features["label"].names) == (4, ["crane", "ibis"])
    assert not caplog.text


def test_what_is_passed_over_is_counted_and_named_once(tmp_path, caplog):
    draw(*(tmp_path / f"{seed}.png" for seed in range(2)))
    for name in ("a.jpg_large", "b.jpg_large", "photo", "c.h5", "d.mpg", "e.jpg?size=big", "notes.txt", "list.json"):
        draw(tmp_path / name)
    assert len(open_dataset(tmp_path)) == 2
    (said,) = (line for line in caplog.messages if "passed over" in line)  # other packages may log, too
    assert "6 files are passed over" in said
    assert "2 without an ending that is known (.jpg_large), e.g. 'a.jpg_large'" in said
    assert "1 without an ending, e.g. 'photo'" in said
    assert "notes" not in said


@pytest.mark.parametrize("mask", ["{}.png", "{}_mask.jpg", "{}_mask_1.png", "{}-Mask.jpg"])
def test_masks_among_photographs_are_counted_and_named(mask, tmp_path, caplog):
    draw(*(tmp_path / "a" / name for seed in range(3) for name in (f"{seed}.jpg", mask.format(seed))))
    draw(tmp_path / "b" / "0.jpg", tmp_path / "b" / "maskerade.png", tmp_path / "b" / "unmask.png")
    assert len(open_dataset(tmp_path)) == 9
    (said,) = caplog.messages
    assert "6 of 9 images share their names" in said
    assert "'a/0.jpg'" in said
    assert f"'a/{mask.format(0)}'" in said


def test_a_heic_file_is_read_or_the_way_is_told(tmp_path, caplog):
    draw(*(tmp_path / f"{seed}.png" for seed in range(2)), tmp_path / "phone.HEIC")
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        assert len(open_dataset(tmp_path)) == 2
        assert "1 .heic (to read them, pip install pillow-heif), e.g. 'phone.HEIC'" in caplog.text
    else:
        assert len(open_dataset(tmp_path)) == 3


def test_a_name_that_is_no_utf8_is_named(tmp_path, caplog):
    draw(*(tmp_path / f"{seed}.png" for seed in range(2)))
    shutil.copy(tmp_path / "0.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    assert len(open_dataset(tmp_path)) == 2
    assert r"1 whose name is not UTF-8 (rename them), e.g. 'caf\udce9.png'" in caplog.text
    caplog.text.encode()


def test_a_data_set_whose_name_is_no_utf8_is_refused(tmp_path):
    rows(2).to_parquet(tmp_path / "file")
    (tmp_path / "file").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.parquet"))
    (tmp_path / os.fsdecode(b"f\xe9")).mkdir()
    draw(tmp_path / os.fsdecode(b"f\xe9") / "1.png")
    for path in (tmp_path / name for name in os.listdir(tmp_path)):
        with pytest.raises(DataError, match=r"udce9.* is not UTF-8; rename it"):
            open_dataset(path)


def test_links_are_followed_and_none_leads_in_circles(tmp_path):
    draw(*(tmp_path / "far" / f"{seed}.png" for seed in range(3)), tmp_path / "set" / "test" / "1.png")
    (tmp_path / "set" / "train").symlink_to(tmp_path / "far", target_is_directory=True)
    (tmp_path / "far" / "up").symlink_to(tmp_path / "set", target_is_directory=True)
    (tmp_path / "set" / "latest").symlink_to(tmp_path / "set" / "test", target_is_directory=True)
    assert sizes(tmp_path / "set") == {"train": 3, "test": 1}
    (tmp_path / "set" / "train" / "one.png").symlink_to(tmp_path / "set" / "test" / "1.png")
    assert sizes(tmp_path / "set") == {"train": 4, "test": 1}


@pytest.mark.parametrize("name", ["what?.parquet", "a*b.parquet", "run[12].parquet", "a::b.parquet", "$HOME.parquet"])
def test_a_file_whose_name_is_a_pattern_is_that_file(name, tmp_path):
    rows(2).to_parquet(tmp_path / "file")
    (tmp_path / "file").rename(tmp_path / name)
    for other in ("whatX.parquet", "aXb.parquet", "run1.parquet"):
        rows(5).to_parquet(tmp_path / other)
    assert len(open_dataset(tmp_path / name)) == 2


@pytest.mark.parametrize("name", ["train[1]", "run[12]", "[D] data", "a*?", "a::b", "$HOME", "~", "c:d", "file://x"])
def test_a_folder_of_images_whose_name_is_a_pattern_is_that_folder(name, tmp_path):
    draw(
        tmp_path / name / "1.png", tmp_path / name / "[2].png", tmp_path / "run1" / "3.png", tmp_path / "aXY" / "4.png"
    )
    assert len(open_dataset(tmp_path / name)) == 2
    (tmp_path / name / "metadata.csv").write_text("file_name,label\n1.png,3\n[2].png,4\n")
    assert open_dataset(tmp_path / name)["label"][:] == [3, 4]


@pytest.mark.parametrize("name", ["c:d", "file:x", "$HOME", "~", "a::b"])
def test_a_relative_name_is_read_as_it_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw(Path(name, "1.png"), Path(name, "2.png"))
    assert [row["image"].size for row in open_dataset(name)] == [(40, 32)] * 2
    draw(Path("masks", "1.png"), Path("masks", "2.png"))
    assert [row["mask"].size for row in open_pairs("masks", name)] == [(40, 32)] * 2
    rows(3).save_to_disk("disk")
    shutil.rmtree(name)
    Path("disk").rename(name)
    assert [row["image"].size for row in open_dataset(name)] == [(40, 32)] * 3


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_metadata_beside_images_are_its_columns(ending, tmp_path, caplog):
    draw(*(tmp_path / f"{seed}.png" for seed in range(4)), *(tmp_path / "masks" / f"{seed}.png" for seed in range(3)))
    columns = {
        "file_name": [f"{seed}.png" for seed in range(3)],
        "mask_file_name": [f"masks/{seed}.png" for seed in range(3)],
        "label": ["ibis", "crane", "ibis"],
    }
    getattr(Dataset.from_dict(columns), {"jsonl": "to_json"}.get(ending, f"to_{ending}"))(
        tmp_path / f"metadata.{ending}"
    )
    opened = open_dataset(tmp_path)
    assert (opened.features["image"], opened.features["mask"]) == (ImageFeature(), ImageFeature())
    assert opened["label"][:] == columns["label"]
    assert [Path(row["image"].filename).name for row in opened] == columns["file_name"]
    assert {Path(row["mask"].filename).parent.name for row in opened} == {"masks"}


def test_metadata_of_each_split_are_its_own(tmp_path):
    for split, number in (("train", 3), ("test", 2)):
        draw(*(tmp_path / split / f"{seed}.png" for seed in range(number)))
        lines = "".join(f"{seed}.png,{split} {seed}\n" for seed in range(number))
        (tmp_path / split / "metadata.csv").write_text(f"file_name,text\n{lines}")
    assert open_dataset(tmp_path, split="test")["text"][:] == ["test 0", "test 1"]
    assert len(open_dataset(tmp_path)) == 3


@pytest.mark.parametrize(
    "names", ["images/{}.png", "images\\{}.png", ".\\images\\{}.png", "./images/../images/{}.png"]
)
def test_metadata_above_a_folder_of_images_describe_it(names, tmp_path, caplog):
    draw(*(tmp_path / "images" / f"{seed}.png" for seed in range(3)))
    lines = "".join(f"{names.format(seed)},{seed + 5}\n" for seed in range(3))
    (tmp_path / "metadata.csv").write_text(f"file_name,label\n{lines}")
    opened = open_dataset(tmp_path)
    assert opened["label"][:] == [5, 6, 7]
    assert [Path(row["image"].filename).resolve() for row in opened] == sorted((tmp_path / "images").iterdir())
    assert not caplog.messages


def test_metadata_above_splits_describe_each(tmp_path):
    draw(*(tmp_path / split / kind / "1.png" for split in ("train", "test") for kind in "ab"))
    lines = "".join(f"{split}/{kind}/1.png,{split} {kind}\n" for kind in "ab" for split in ("test", "train"))
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{lines}")
    assert sizes(tmp_path) == {"train": 2, "test": 2}
    opened = open_dataset(tmp_path, split="test")
    assert (opened["text"][:], opened.split) == (["test a", "test b"], "test")


def test_rows_without_an_image_and_images_without_a_row_are_counted_and_named(tmp_path, caplog):
    draw(*(tmp_path / "images" / f"{seed}.png" for seed in range(4)))
    (tmp_path / "metadata.jsonl").write_text(
        "".join(f'{{"file_name": "images/{seed}.png", "id": {seed}}}\n' for seed in (3, 7, 1, 9))
    )
    assert open_dataset(tmp_path)["id"][:] == [3, 1]
    assert "2 of 4 rows in the metadata" in caplog.text
    assert "passed over: images/7.png, images/9.png." in caplog.text
    assert "2 of 4 images are not in the metadata" in caplog.text
    shutil.rmtree(tmp_path / "images")
    draw(tmp_path / "0.png")
    with pytest.raises(DataError, match="name no image that is there"):
        open_dataset(tmp_path)


def test_metadata_of_other_columns_are_refused_by_name(tmp_path):
    for split, column in (("train", "label"), ("test", "text")):
        draw(tmp_path / split / "1.png")
        (tmp_path / split / "metadata.csv").write_text(f"file_name,{column}\n1.png,3\n")
    with pytest.raises(
        DataError, match=r"train/metadata.csv and .*test/metadata.csv|test/metadata.csv and .*train/met"
    ):
        open_dataset(tmp_path)


def test_metadata_that_name_no_file_are_refused(tmp_path):
    draw(tmp_path / "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n")
    with pytest.raises(DataError, match="have no rows"):
        open_dataset(tmp_path)
    (tmp_path / "metadata.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="file_name"):
        open_dataset(tmp_path)


def test_images_and_masks_pair_in_splits_of_other_spelling(tmp_path):
    draw(tmp_path / "images" / "Train" / "1.png", tmp_path / "images" / "val" / "2.png")
    draw(tmp_path / "masks" / "train" / "1.png", tmp_path / "masks" / "validation" / "2.png")
    assert len(open_pairs(tmp_path / "images", tmp_path / "masks", split="validation")) == 1
