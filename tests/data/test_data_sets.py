"""Images come out of data sets in a seeded order, and a broken one costs itself alone."""

import inspect
import io

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value
from datasets import Image as ImageFeature
from datasets.distributed import split_dataset_by_node
from PIL import Image

from soap_hf.data.blocks import ImageBlocks
from soap_hf.data.data_sets import open_dataset
from soap_hf.data.image_files import BadImage
from soap_hf.data.image_sample import ImageSample
from soap_hf.data.preprocessing import ImagePreprocessor
from soap_hf.evaluation.examples import Examples
from soap_hf.runtime.errors import DataError, VersionError
from tests.conftest import noise_image

NUM_IMAGES = 12


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """Keeps what `datasets` prepares out of the user's cache, and its streams from sleeping for 5 s at their end."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.2, raising=False)  # datasets 5.0
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def few(images):
    """The first 12 images of noise."""
    return images.select(range(NUM_IMAGES))


@pytest.fixture
def preprocess(processor):
    return ImagePreprocessor(processor)


def save_images(folder, number=NUM_IMAGES):
    """Writes images of noise as PNG files."""
    folder.mkdir(parents=True)
    for seed in range(number):
        noise_image(seed).save(folder / f"{seed:02d}.png")
    return folder


def png(seed=0):
    """Bytes of a PNG file."""
    buffer = io.BytesIO()
    noise_image(seed).save(buffer, "PNG")
    return buffer.getvalue()


def read(sample, preprocess, batch_size=4, **kwargs):
    """All pixels of a sample, and all its bad images."""
    batches = list(sample.batches(preprocess.of_example, batch_size, **{"num_workers": 0, **kwargs}))
    pixels = [batch.values for batch in batches if batch.positions]
    return torch.cat(pixels), [image for batch in batches for image in batch.bad]


def sample_of(dataset, num_images=None, seed=0):
    return ImageSample(dataset, "image", num_images, seed)


def image_folder(few, folder):
    return save_images(folder)


def parquet_file(few, folder):
    few.to_parquet(folder.with_suffix(".parquet"))
    return folder.with_suffix(".parquet")


def parquet_folder(few, folder):
    (folder / "data").mkdir(parents=True)
    for name in "ab":
        few.select(range(NUM_IMAGES // 2)).to_parquet(folder / "data" / f"{name}.parquet")
    return folder


def saved_by_datasets(few, folder):
    few.save_to_disk(folder)
    return folder


def in_memory(few, folder):
    return few


@pytest.mark.parametrize("make", [image_folder, parquet_file, parquet_folder, saved_by_datasets, in_memory])
def test_every_kind_of_data_set_gives_its_images(make, few, tmp_path, preprocess):
    opened = open_dataset(make(few, tmp_path / "set"))
    pixels, bad = read(sample_of(opened), preprocess)
    assert pixels.shape == (NUM_IMAGES, 3, 32, 32)
    assert not bad


def test_the_images_read_are_those_of_the_data_set(few, tmp_path, preprocess):
    expected = {preprocess(image).sum().item() for image in few["image"]}
    for make in (image_folder, parquet_file, saved_by_datasets):
        pixels, _ = read(sample_of(open_dataset(str(make(few, tmp_path / make.__name__)))), preprocess)
        assert {image.sum().item() for image in pixels} == expected, make.__name__


def test_a_parquet_file_streams(few, tmp_path, preprocess):
    streamed = open_dataset(parquet_file(few, tmp_path / "set"), streaming=True)
    assert isinstance(streamed, IterableDataset)
    everything, _ = read(sample_of(streamed), preprocess)
    five, _ = read(sample_of(streamed, 5), preprocess)
    assert (len(everything), len(five)) == (NUM_IMAGES, 5)
    assert torch.equal(five, everything[:5])


def test_a_split_is_chosen(few, tmp_path):
    splits = DatasetDict(train=few, validation=few.select(range(3)))
    splits.save_to_disk(tmp_path / "disk")
    save_images(tmp_path / "folder" / "train", 4)
    save_images(tmp_path / "folder" / "validation", 3)
    for dataset in (splits, tmp_path / "disk", tmp_path / "folder"):
        assert len(open_dataset(dataset, split="validation")) == 3
        assert len(open_dataset(dataset)) > 3, "train is the default"
    for dataset in (splits, tmp_path / "disk", tmp_path / "folder"):
        assert len(open_dataset(dataset, split="train[:2]")) == 2
    with pytest.raises(DataError, match="no slice"):
        open_dataset(splits, split="train[two]")
    assert len(open_dataset(DatasetDict(only=few))) == NUM_IMAGES


@pytest.mark.parametrize("split", ["test", "tests[:2]"])
def test_a_split_that_is_not_there_lists_those_that_are(split, few):
    with pytest.raises(DataError, match=r"no split '.+'; choose one of train, validation\."):
        open_dataset(DatasetDict(train=few, validation=few), split=split)


def test_several_splits_without_train_must_be_chosen_from(few):
    with pytest.raises(DataError, match=r"choose one of left, right with split=…"):
        open_dataset(DatasetDict(left=few, right=few))


def test_what_is_no_data_set_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no images here")
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    (tmp_path / "films").mkdir()
    for film in ("a.mp4", "b.MP4"):
        (tmp_path / "films" / film).write_bytes(b"film")
    for name, message in {
        "notes.txt": "is a file but neither parquet nor tar",
        "broken.parquet": "cannot be opened",
        "empty": "holds no images, parquet or tar files, since it is empty; give",
        "texts": "holds no images, parquet or tar files; give",
        "films": r"tar files, but 2 \.mp4 \(videos; save their frames as images\), e\.g\. 'a\.mp4'; give",
        "missing": "There is no file or folder .*; check the path",
        "note.txt": "There is no file or folder .*; did you mean .*notes.txt",
    }.items():
        with pytest.raises(DataError, match=message) as raised:
            open_dataset(str(tmp_path / name))
        assert name in str(raised.value)
    with pytest.raises(DataError, match="nobody/no-such-data-set"):
        open_dataset("nobody/no-such-data-set")
    with pytest.raises(DataError, match="not dict"):
        open_dataset({"image": [noise_image(0)]})


def test_a_seed_names_the_sample_and_its_order(few, preprocess):
    first, _ = read(sample_of(few, 6, seed=3), preprocess)
    again = sample_of(few, 6, seed=3)
    assert torch.equal(read(again, preprocess)[0], first)
    assert torch.equal(read(again, preprocess, batch_size=5)[0], first), "the same a second time, whatever the batch"
    assert not torch.equal(read(sample_of(few, 6, seed=4), preprocess)[0], first)


def test_a_sample_is_random_and_not_the_head_of_the_data_set(images, preprocess):
    drawn, _ = read(sample_of(images, 20), preprocess)
    head = torch.stack([preprocess(image) for image in images.select(range(20))["image"]])
    assert {image.sum().item() for image in drawn} - {image.sum().item() for image in head}


def test_a_sample_holds_at_most_as_many_images_as_there_are(few, preprocess):
    assert sample_of(few, 5).available == len(read(sample_of(few, 5), preprocess)[0]) == 5
    assert sample_of(few, 5000).available == len(read(sample_of(few, 5000), preprocess)[0]) == NUM_IMAGES
    drawn, _ = read(sample_of(few), preprocess)
    assert len({image.sum().item() for image in drawn}) == NUM_IMAGES, "no image twice"


def test_a_column_that_is_not_there_lists_those_that_are(few):
    with pytest.raises(DataError, match=r"no column 'picture'; choose one of image, label with image_column=…"):
        ImageSample(few, "picture", None, 0)
    with pytest.raises(DataError, match=r"choose one of image, label"):
        ImageSample(few.to_iterable_dataset(), "picture", None, 0)


def test_a_column_of_labels_is_refused(few):
    for dataset in (few, few.to_iterable_dataset(), IterableDataset.from_generator(lambda: iter([{"label": 3}]))):
        with pytest.raises(DataError, match=r"Column 'label' holds .*int.*, not images; choose another"):
            ImageSample(dataset, "label", None, 0)


@pytest.mark.parametrize("number", [0, 1])
def test_fewer_than_two_images_are_refused(number, few):
    with pytest.raises(DataError, match=f"2 images are needed, but the data set has {number}"):
        sample_of(few.select(range(number)))


def test_bytes_and_untyped_streams_hold_images_too(preprocess):
    raw = Dataset.from_dict({"image": [png(seed) for seed in range(3)]})
    stream = IterableDataset.from_generator(lambda: ({"image": noise_image(seed)} for seed in range(3)))
    lazy = IterableDataset.from_generator(
        lambda: ({"image": Image.open(io.BytesIO(data))} for data in (png(0), png(1), png(2), png(3)[:1500]))
    )
    assert raw.features["image"] == Value("binary")
    assert stream.features is lazy.features is None
    expected = {preprocess(noise_image(seed)).sum().item() for seed in range(3)}
    for dataset, broken in ((raw, 0), (stream, 0), (lazy, 1)):
        pixels, bad = read(sample_of(dataset), preprocess)
        assert {image.sum().item() for image in pixels} == expected
        assert len(bad) == broken


@pytest.mark.parametrize("mode", ["L", "1"])
@pytest.mark.parametrize("kind", ["rows", "stream", "blocks"])
def test_the_mode_that_a_data_set_asks_for_is_kept(mode, kind):
    files = [{"bytes": png(seed), "path": None} for seed in range(3)]
    features = Features({"image": ImageFeature(mode=mode), "mask": ImageFeature(mode=mode)})
    dataset = Dataset.from_dict({"image": files, "mask": files}, features=features)
    dataset = dataset.to_iterable_dataset() if kind == "stream" else dataset
    expected = [noise_image(seed).convert(mode) for seed in range(3)]
    if kind == "blocks":
        how = {"num_workers": 0, "size": 3, "wanted": lambda block: True, "phase": "", "progress": False}
        parts = ImageBlocks(dataset, "image", mask_column="mask").read(_both, 3, max_bad_fraction=0, **how)
        batches = [part.batch for part in parts]
    else:
        batches = list(ImageSample(dataset, "image", None, None, mask_column="mask").batches(_both, 3, 0))
    for (image, mask), right in zip(batches[0].values, expected, strict=True):
        assert (image.mode, mask.mode) == ("RGB", mode)
        assert image.tobytes() == right.convert("RGB").tobytes()
        assert mask.tobytes() == right.tobytes()


def _both(example):
    return example.image, example.mask


def broken_set():
    """Eight good images and four that cannot be read."""
    broken = {
        "corrupt.png": b"these are no pixels",
        "truncated.png": png(1)[:1500],
        "empty.png": b"",
    }
    rows = [{"bytes": png(seed), "path": f"good{seed}.png"} for seed in range(8)]
    rows += [{"bytes": data, "path": name} for name, data in broken.items()]
    return Dataset.from_dict({"image": [*rows, None]}, features=Features({"image": ImageFeature()}))


@pytest.mark.parametrize("streamed", [False, True])
def test_bad_images_are_named_and_everything_else_is_kept(streamed, preprocess):
    dataset = broken_set()
    pixels, bad = read(sample_of(dataset.to_iterable_dataset() if streamed else dataset), preprocess)
    expected = {preprocess(noise_image(seed)).sum().item() for seed in range(8)}
    assert {image.sum().item() for image in pixels} == expected
    assert all(isinstance(image, BadImage) for image in bad)
    reasons = {image.name.partition(" ")[0]: image.reason for image in bad}
    assert reasons.keys() == {"corrupt.png", "empty.png", "truncated.png", "row"}
    assert reasons["corrupt.png"] == reasons["empty.png"] == "no known image format"
    assert "truncated" in reasons["truncated.png"]
    assert reasons["row"] == "no image"


def test_a_broken_file_in_a_folder_is_named(tmp_path, preprocess):
    folder = save_images(tmp_path / "set", 5)
    (folder / "cut.png").write_bytes(png(3)[:900])
    pixels, bad = read(sample_of(open_dataset(folder)), preprocess)
    assert len(pixels) == 5
    assert [image.name for image in bad] == [str(folder / "cut.png")]


def test_a_batch_without_a_readable_image_has_no_pixels(preprocess):
    dataset = Dataset.from_dict({"image": [b"no", b"none"]})
    (batch,) = sample_of(dataset).batches(preprocess.of_example, 4)
    assert batch.values == []
    assert len(batch.bad) == 2
    assert batch.positions == []


def test_worker_processes_give_the_same_batches(preprocess):
    sample = sample_of(broken_set())
    alone, shared = (list(sample.batches(preprocess.of_example, 5, num_workers=number)) for number in (0, 2))
    assert len(alone) == len(shared) == 3
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.values, other.values)
        assert one[1:] == other[1:]


def test_a_stream_gives_the_same_images_once_with_workers(few, preprocess):
    sample = sample_of(few.to_iterable_dataset(), 7)
    assert torch.equal(read(sample, preprocess, num_workers=2)[0], read(sample, preprocess)[0])


def test_reading_leaves_the_global_random_numbers_alone(few, preprocess):
    before = torch.random.get_rng_state()
    read(sample_of(few, 6, seed=1), preprocess, num_workers=2)
    read(sample_of(few.to_iterable_dataset(), 6, seed=1), preprocess)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_names_of_files_and_stray_files_do_not_matter(tmp_path):
    """Every image of a folder counts, whatever it is called and whatever lies beside it."""
    (folder := tmp_path / "my [photos]").mkdir()
    for name in ("train_0", "test-1", "val", "image"):
        noise_image(len(name)).save(folder / f"{name}.png")
    (folder / "notes.csv").write_text("a,b\n1,2\n")
    assert len(open_dataset(folder)) == 4


def test_a_stream_that_is_mostly_broken_is_refused_at_its_end(vit, processor, tmp_path):
    from soap_hf import fit_soap

    rows = [noise_image(seed) for seed in range(10)]
    good = Dataset.from_dict({"image": rows}).cast_column("image", ImageFeature(decode=False))
    bad = [{"bytes": b"broken", "path": f"{row}.png"} for row in range(10)]
    stream = Dataset.from_dict({"image": [*good["image"], *bad]}).to_iterable_dataset()
    for progress in (False, True):
        with pytest.raises(DataError, match="Too many unreadable"):
            fit_soap(vit, stream, image_processor=processor, num_images=1000, progress=progress)
    some = Dataset.from_dict({"image": [*good["image"], bad[0]]}).to_iterable_dataset()
    model = fit_soap(vit, some, image_processor=processor, num_images=None, max_bad_fraction=0.1, progress=False)
    assert model.config.fit["num_bad_images"] == 1


OLD_DATASETS = "strategy" not in inspect.signature(split_dataset_by_node).parameters
"""Before 5.1 it deals out no stream image by image."""


def refused(sample, preprocess):
    with pytest.raises(VersionError, match=r"A stream in 2 processes needs datasets 5\.1 or newer"):
        next(iter(sample.batches(preprocess.of_example, 2, 0, rank=0, num_processes=2)))


@pytest.mark.parametrize("num_images", [None, 9])
@pytest.mark.parametrize("kind", ["rows", "stream", "stream of two files"])
@pytest.mark.parametrize("num_processes", [1, 2, 3, 14])
def test_processes_read_each_image_once_and_keep_step(few, preprocess, kind, num_images, num_processes):
    data = few if kind == "rows" else few.to_iterable_dataset(num_shards=2 if "two" in kind else 1)
    sample = sample_of(data, num_images)
    whole, _ = read(sample, preprocess)
    if OLD_DATASETS and sample.streamed and not sample.in_parts and num_processes > 1:
        return refused(sample, preprocess)
    shares = [
        list(sample.batches(preprocess.of_example, 2, 0, rank=rank, num_processes=num_processes))
        for rank in range(num_processes)
    ]
    positions = [position for share in shares for batch in share for position in batch.positions]
    pixels = [image for share in shares for batch in share for image in batch.values]
    assert len(set(positions)) == len(positions) == len(whole)
    if not sample.in_parts:
        assert sorted(positions) == list(range(len(whole)))
        assert all(torch.equal(image, whole[at]) for at, image in zip(positions, pixels, strict=True))
        first_turns = [position for share in shares for batch in share[:1] for position in batch.positions]
        assert sorted(first_turns) == list(range(min(len(whole), 2 * num_processes)))
    assert {image.sum().item() for image in pixels} == {image.sum().item() for image in whole}


@pytest.mark.parametrize("streamed", [False, True])
def test_reading_goes_on_from_any_position_with_any_number_of_processes(few, preprocess, streamed):
    sample = sample_of(few.to_iterable_dataset() if streamed else few, 11)
    whole, _ = read(sample, preprocess)
    for start, stop, number in ((4, 99, 2), (5, 9, 3), (0, 4, 2), (11, 99, 1)):
        if OLD_DATASETS and streamed and number > 1:
            refused(sample, preprocess)
            continue
        batches = [
            batch
            for rank in range(number)
            for batch in sample.batches(
                preprocess.of_example, 2, 0, start=start, stop=stop, rank=rank, num_processes=number
            )
        ]
        positions = [position for batch in batches for position in batch.positions]
        assert sorted(positions) == list(range(start, min(11, stop)))
        for batch in batches:
            assert torch.equal(batch.values, whole[batch.positions])


def test_an_endless_stream_needs_a_number_of_images(few, preprocess):
    endless = few.to_iterable_dataset().repeat(None)
    for dataset in (endless, endless.map(lambda row: row)):
        with pytest.raises(DataError, match="for ever; say how many images to read with num_images"):
            sample_of(dataset)
    assert len(read(sample_of(endless, 20), preprocess)[0]) == 20


def save_class_folders(root, *names, number=3):
    """Images of noise below each of some folders."""
    for name in names:
        (root / name).mkdir(parents=True)
        for seed in range(number):
            noise_image(seed).save(root / name / f"{seed}.png")
    return root


def test_sub_folders_are_classes(tmp_path):
    opened = open_dataset(save_class_folders(tmp_path, "ibis/young", "crane"))
    assert opened.features["label"].names == ["crane", "ibis"]
    assert opened["label"][:] == [0, 0, 0, 1, 1, 1]
    assert [label == 0 for label in opened["label"]] == ["crane" in image.filename for image in opened["image"]]


def test_classes_have_one_number_in_all_splits(tmp_path):
    save_class_folders(tmp_path, "train/ibis", "train/crane", "test/ibis")
    train, test = (open_dataset(tmp_path, split=split) for split in ("train", "test"))
    assert train.features == test.features
    assert test["label"][:] == [1, 1, 1]


@pytest.mark.parametrize("folders", [["ibis"], ["ibis", "."], ["train", "test"], ["train/ibis", "test"]])
def test_other_folders_are_no_classes(tmp_path, folders):
    for folder in folders:
        noise = tmp_path / folder
        noise.mkdir(parents=True, exist_ok=True)
        noise_image(0).save(noise / "0.png")
    assert open_dataset(tmp_path).column_names == ["image"]


def test_classes_change_nothing_of_a_sample(tmp_path, preprocess):
    opened = open_dataset(save_class_folders(tmp_path, "a", "b", "c"))
    labelled, _ = read(sample_of(opened, 5), preprocess)
    bare, _ = read(sample_of(opened.remove_columns("label"), 5), preprocess)
    assert torch.equal(labelled, bare)


@pytest.mark.parametrize("kind", ["pandas", "arrow", "numpy", "torch"])
@pytest.mark.parametrize("way", ["all columns", "labels alone", "a stream"])
def test_the_format_of_a_data_set_changes_nothing(kind, way, few, preprocess):
    data = few.to_iterable_dataset() if way == "a stream" else few
    formatted = data.with_format(kind, columns=["label"]) if way == "labels alone" else data.with_format(kind)
    assert torch.equal(read(sample_of(formatted, 7), preprocess)[0], read(sample_of(data, 7), preprocess)[0])


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas"])
def test_labels_come_out_of_any_format(kind, few):
    named = few.cast_column("label", ClassLabel(names=[f"bird {number}" for number in range(80)]))
    labels = Examples(named, label_column="label").labels
    assert Examples(named.with_format(kind), label_column="label").labels == labels
    assert labels[0].startswith("bird")


def test_a_transform_is_refused_rather_than_left_out(few):
    with pytest.raises(DataError, match="has a transform, which is left out"):
        sample_of(few.with_transform(lambda rows: rows))


def test_an_image_that_cannot_be_prepared_is_a_bad_one(few, preprocess):
    def prepare(example):
        if example.row == 3:
            raise MemoryError
        return preprocess.of_example(example)

    (batch,) = sample_of(few, None).batches(prepare, 99, 0)
    assert (len(batch.values), [str(image) for image in batch.bad]) == (11, ["row 3 (MemoryError)"])
