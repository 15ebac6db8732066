"""Images, masks and labels come out together, in order, and what does not fit together is refused in a sentence."""

import io

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from soap_hf.evaluation.examples import Examples, open_pairs, short_names
from soap_hf.runtime.errors import DataError
from tests.conftest import noise_image


def save_pair(root, name, *, mask="png", mask_size=(40, 32)):
    """An image and its mask below `images` and `masks`; with `mask=None` the image alone."""
    for kind in ("images", "masks"):
        (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
    noise_image(len(name)).save(root / "images" / f"{name}.jpg")
    if mask:
        Image.new("L", mask_size, len(name)).save(root / "masks" / f"{name}.{mask}")


@pytest.fixture
def folders(tmp_path):
    """Three pairs of image and mask, in folders."""
    for name in ("b/two", "a", "c.v2"):
        save_pair(tmp_path, name)
    return tmp_path / "images", tmp_path / "masks"


def read(examples, batch_size=2, prepare=lambda example: example, **kwargs):
    """Everything that comes out, in one list."""
    return [value for part in examples.measured(prepare, list, batch_size, **kwargs) for value in part.value]


def test_folders_pair_up_by_name(folders):
    found = read(Examples(open_pairs(*folders), mask_column="mask"))
    assert short_names([one.name for one in found]) == ["a.jpg", "b/two.jpg", "c.v2.jpg"]
    for one, length in zip(found, (1, 5, 4), strict=True):
        assert one.image.mode == "RGB"
        assert one.mask.getextrema() == (length, length), "each image has its own mask"


def test_columns_of_a_data_set_pair_up_by_row(folders):
    dataset = open_pairs(*folders).rename_columns({"image": "photo", "mask": "truth"})
    (one, *_) = read(Examples(open_pairs(dataset), "photo", mask_column="truth"))
    assert one.mask.getextrema() == (1, 1)
    with pytest.raises(DataError, match=r"no column 'mask'; choose one of photo, truth with mask_column=…"):
        Examples(dataset, "photo", mask_column="mask")
    with pytest.raises(DataError, match=r"no column 'image'; choose one of photo, truth with image_column=…"):
        Examples(dataset)


def test_folders_named_as_splits_make_splits(tmp_path):
    for name in ("train/a", "train/b", "test/a"):
        save_pair(tmp_path, name)
    folders = tmp_path / "images", tmp_path / "masks"
    assert len(open_pairs(*folders)) == len(open_pairs(*folders, split="train")) == 2
    assert len(open_pairs(*folders, split="test")) == 1


def test_orphans_are_named(folders):
    root = folders[0].parent
    for number in range(7):
        save_pair(root, f"orphan{number}", mask=None)
    with pytest.raises(
        DataError, match=r"^7 of 10 files have no mask of the same name \(orphan0\.jpg, .*orphan4\.jpg …\)"
    ):
        open_pairs(*folders)
    with pytest.raises(DataError, match=r"^7 of 10 files have no image of the same name \(orphan0\.jpg"):
        open_pairs(*reversed(folders))


def test_folders_that_cannot_pair_up_are_refused(folders, tmp_path):
    with pytest.raises(DataError, match=r"nowhere is no folder; images and masks must be two folders"):
        open_pairs(folders[0], tmp_path / "nowhere")
    with pytest.raises(DataError, match="is no folder"):
        open_pairs(Dataset.from_dict({"image": [1]}), folders[1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no masks"):
        open_pairs(folders[0], tmp_path / "empty")
    save_pair(tmp_path, "a", mask="bmp")
    with pytest.raises(DataError, match=r"a\.bmp and .*a\.png have one name"):
        open_pairs(*folders)


def test_a_mask_of_another_size_is_resized_or_refused(tmp_path):
    save_pair(tmp_path, "a")
    save_pair(tmp_path, "bb", mask_size=(20, 16))
    pairs = open_pairs(tmp_path / "images", tmp_path / "masks")
    sizes = [one.mask.size for one in read(Examples(pairs, mask_column="mask"))]
    assert sizes == [(40, 32), (40, 32)]
    with pytest.raises(DataError, match=r"bb\.jpg has 20 x 16 pixels, but the image 40 x 32; mend it"):
        read(Examples(pairs, mask_column="mask", resize_masks=False))


def test_labels_go_by_name():
    kinds = {"label": ClassLabel(names=["crane", "ibis"]), "number": Value("int32"), "text": Value("string")}
    rows = {"label": [1, 0, 1], "number": [7, 8, 7], "text": ["x", "y", "x"]}
    pictures = list(map(noise_image, range(3)))
    dataset = Dataset.from_dict({**rows, "image": pictures}, features=Features({**kinds, "image": ImageFeature()}))
    assert Examples(dataset, label_column="label").labels == ["ibis", "crane", "ibis"]
    assert Examples(dataset, label_column="number").labels == ["7", "8", "7"]
    assert Examples(dataset, label_column="text").labels == ["x", "y", "x"]
    some = Examples(dataset, label_column="label", num_images=2)
    assert some.labels == [("ibis", "crane", "ibis")[number] for number in some.numbers]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            "class",
            r"no column 'class' of labels; choose one of .*with label_column=…, or put the images of each class",
        ),
        ("image", "holds Image.*, not labels"),
        ("score", "holds Value.*float64.*, not labels"),
        ("label", "^1 of 3 images have no label in column 'label'"),
        ("text", "^2 of 3 images have no label in column 'text'"),
    ],
)
def test_missing_labels_are_refused(column, message):
    features = Features(
        {"image": ImageFeature(), "label": ClassLabel(names=["a"]), "text": Value("string"), "score": Value("float64")}
    )
    rows = {
        "image": list(map(noise_image, range(3))),
        "label": [0, -1, 0],
        "text": [None, "b", None],
        "score": [0.5] * 3,
    }
    with pytest.raises(DataError, match=message):
        Examples(Dataset.from_dict(rows, features=features), label_column=column)


def test_the_order_is_that_of_the_data_set_and_a_sample_is_seeded(images):
    assert [one.name for one in read(Examples(images), 7)] == [f"row {number}" for number in range(80)]
    first, again, other = (Examples(images, num_images=20, seed=seed).numbers for seed in (1, 1, 2))
    assert first == again == sorted(first)
    assert len(set(first)) == 20
    assert first != other
    assert first != list(range(20))


def test_one_image_or_a_stream_is_refused(images):
    with pytest.raises(DataError, match="2 images are needed, but the data set has 1"):
        Examples(images.select(range(1)))
    with pytest.raises(DataError, match="not a stream"):
        Examples(images.to_iterable_dataset())


def broken_set(good, bad):
    """Some images of noise and some files that are none."""
    buffer = io.BytesIO()
    noise_image(0).save(buffer, "PNG")
    rows = [{"bytes": buffer.getvalue(), "path": f"good{number}.png"} for number in range(good)]
    rows[1:1] = [{"bytes": b"no pixels", "path": f"bad{number}.png"} for number in range(bad)]
    return Dataset.from_dict({"image": rows}, features=Features({"image": ImageFeature()}))


def test_an_unreadable_image_costs_itself_alone(caplog):
    examples = Examples(broken_set(good=5, bad=1))
    assert [one.name for one in read(examples)] == ["good0.png", "good1.png", "good2.png", "good3.png", "good4.png"]
    assert [str(bad) for bad in examples.bad_images] == ["bad0.png (no known image format)"]
    assert "1 unreadable images were skipped: bad0.png" in caplog.text
    read(examples)
    assert len(examples.bad_images) == 1, "read twice, counted once"


def test_an_unreadable_mask_costs_its_image(folders):
    (folders[1] / "a.png").write_bytes(b"no pixels")
    examples = Examples(open_pairs(*folders), mask_column="mask")
    assert len(read(examples)) == 2
    assert examples.bad_images[0].name == str(folders[1] / "a.png")


def test_too_many_unreadable_images_stop_the_work():
    with pytest.raises(DataError, match=r"Too many unreadable images \(3 among the first 4\): bad0.png"):
        read(Examples(broken_set(good=5, bad=3)), batch_size=4)
    assert len(read(Examples(broken_set(good=5, bad=3), max_bad_fraction=0.5))) == 5


def size_of(example):
    """What worker processes can run."""
    return example.image.size


def test_processes_change_nothing_and_errors_stay_one_sentence(images, folders, monkeypatch):
    alone = read(Examples(images), 7, size_of)
    monkeypatch.setattr("soap_hf.data.image_sample.default_workers", lambda number: 2)
    assert read(Examples(images), 7, size_of) == alone
    Image.new("L", (3, 3)).save(folders[1] / "a.png")
    with pytest.raises(DataError) as raised:
        read(Examples(open_pairs(*folders), mask_column="mask", resize_masks=False), prepare=size_of)
    assert "\n" not in str(raised.value)


def test_reading_leaves_the_global_random_numbers_alone(images):
    before = torch.random.get_rng_state()
    read(Examples(images, num_images=5))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_names_are_short_and_tell_files_apart():
    assert short_names(["row 0", "row 1"]) == ["row 0", "row 1"]
    assert short_names(["/a/b.png"]) == ["/a/b.png"]


def test_splits_of_a_data_set_are_chosen(images):
    splits = DatasetDict(train=images, test=images.select(range(5)))
    assert len(open_pairs(splits, split="test")) == 5
