"""Folders of shards: the same for any number of processes, from any source, after any interruption."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import pandas as pd
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from typer.testing import CliRunner

from soap_hf import SOAPModelWrapper
from soap_hf.cli.app import app
from soap_hf.extract.extraction import extract_features
from soap_hf.extract.features import Kept
from soap_hf.runtime.errors import DataError, OutputError, SOAPError
from tests.conftest import ROOT, noise_image

OPTIONS = {"batch_size": 4, "progress": False}


@pytest.fixture(scope="module")
def head(tmp_path_factory, mae_folder):
    """A head of the demo's backbone."""
    folder = tmp_path_factory.mktemp("head") / "head"
    SOAPModelWrapper.from_backbone(str(mae_folder), None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Three tar files of 5, 6 and 7 images with captions."""
    folder = tmp_path_factory.mktemp("tars")
    for number in range(3):
        with tarfile.open(folder / f"shard-{number:03d}.tar", "w") as tar:
            for image in range(5 + number):
                stream = io.BytesIO()
                noise_image(10 * number + image).save(stream, "PNG")
                for ending, content in (("png", stream.getvalue()), ("txt", f"{number} {image}".encode())):
                    member = tarfile.TarInfo(f"{number}-{image}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture
def rows():
    """21 images with names."""
    return Dataset.from_dict({"image": [noise_image(seed) for seed in range(21)], "name": list(map(str, range(21)))})


def rows_of(folder):
    """All rows of a folder of features, in the order of its manifest."""
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    return [row for shard in shards for row in pq.read_table(folder / shard["file"]).to_pylist()]


def same(rows, others):
    """Whether two lists of rows are alike, features up to rounding."""
    assert [{**row, "features": None} for row in rows] == [{**row, "features": None} for row in others]
    ours, theirs = (torch.tensor([row["features"] for row in some]) for some in (rows, others))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    return True


def run(*arguments, processes=1, **environment):
    """`soap-hf extract` in so many processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*(launcher if processes > 1 else [sys.executable]), "-m", "soap_hf", "extract", *map(str, arguments)]
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(process):
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    return output


def test_a_folder_holds_what_a_file_would(model, rows, tmp_path):
    assert extract_features(model, rows, tmp_path / "features", shard_size=8, **OPTIONS) == 21
    extract_features(model, rows, tmp_path / "features.parquet", **OPTIONS)
    assert same(rows_of(tmp_path / "features"), pq.read_table(tmp_path / "features.parquet").to_pylist())
    names = sorted(path.name for path in (tmp_path / "features" / "shards").iterdir())
    assert names == [f"part-{number:05d}-of-00003.parquet" for number in range(3)]


def test_others_read_the_shards(model, rows, tmp_path):
    extract_features(model, rows, tmp_path / "features", shard_size=8, **OPTIONS)
    data, cache = tmp_path / "features" / "shards", str(tmp_path / "cache")
    expected = rows_of(tmp_path / "features")
    assert [row["name"] for row in expected] == rows["name"][:]
    assert pads.dataset(data).to_table().to_pylist() == expected
    frame = pd.read_parquet(data)
    assert frame["row"].tolist() == list(range(21))
    assert frame["features"][3].tolist() == expected[3]["features"]
    for loaded in (
        load_dataset("parquet", data_dir=str(data), split="train", cache_dir=cache),
        load_dataset(str(tmp_path / "features"), split="train", cache_dir=cache),
    ):
        assert loaded.features["features"].length == 32
        assert loaded[:]["features"] == [row["features"] for row in expected]


def test_each_shard_says_what_made_it(model, rows, tmp_path):
    extract_features(model, rows, tmp_path / "features", shard_size=8, **OPTIONS)
    about = json.loads(pq.read_metadata(tmp_path / "features/shards/part-00001-of-00003.parquet").metadata[b"soap_hf"])
    assert about["layers"] == [-1]
    assert about["kept"] == "mean"
    assert about["versions"]["soap_hf"]


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_writes_the_same(head, photos, processes, tmp_path):
    extract_features(str(head), photos, tmp_path / "alone", shard_size=14, progress=False)
    options = ["--shard-size", "14", "--quiet"]
    finished(run(head, photos, "--output", tmp_path / "together", *options, processes=processes))
    assert same(rows_of(tmp_path / "together"), rows_of(tmp_path / "alone"))
    names = [sorted(path.name for path in (tmp_path / name / "shards").iterdir()) for name in ("alone", "together")]
    assert names[0] == names[1]


@pytest.mark.parametrize(("processes", "size"), [(2, "3"), (3, "100")])  # of 5, 6 and 7 rows
def test_processes_share_tar_files_and_some_may_have_none(head, tars, processes, size, tmp_path):
    options = ["--streaming", "--image-column", "png", "--shard-size", size, "--quiet"]
    own = {"image_column": "png", "streaming": True, "shard_size": int(size), "progress": False}
    extract_features(str(head), tars, tmp_path / "alone", **own)
    finished(run(head, tars, "--output", tmp_path / "together", *options, processes=processes))
    expected = rows_of(tmp_path / "alone")
    assert same(rows_of(tmp_path / "together"), expected)
    assert [(row["source"], row["row"]) for row in expected] == [(s, i) for s in range(3) for i in range(5 + s)]
    assert [row["txt"] for row in expected] == [f"{s} {i}" for s in range(3) for i in range(5 + s)]
    assert [row["file_name"] for row in expected] == [f"{s}-{i}.png" for s in range(3) for i in range(5 + s)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [None, 10])
def test_a_stream_gives_what_its_rows_give(model, rows, workers, number, tmp_path):
    options = {**OPTIONS, "shard_size": 5, "num_images": number}
    extract_features(model, rows, tmp_path / "rows", **options)
    stream = rows.to_iterable_dataset(num_shards=1)
    extract_features(model, stream, tmp_path / "stream", num_workers=workers, **options)
    assert same(rows_of(tmp_path / "stream"), rows_of(tmp_path / "rows"))


def test_a_stream_of_several_files_is_read_file_by_file_or_as_one(model, rows, tmp_path):
    stream = rows.to_iterable_dataset(num_shards=4)
    extract_features(model, stream, tmp_path / "files", shard_size=3, **OPTIONS)
    found = rows_of(tmp_path / "files")
    assert [row["name"] for row in found] == rows["name"][:]
    assert [row["source"] for row in found] == sorted(row["source"] for row in found)
    assert max(row["source"] for row in found) == 3
    for name, other in (("limited", stream), ("taken", stream.take(11))):  # rows are counted across the files
        extract_features(model, other, tmp_path / name, shard_size=3, num_images=11, **OPTIONS)
        assert [row["name"] for row in rows_of(tmp_path / name)] == rows["name"][:11]
    extract_features(model, stream.take(11), tmp_path / "taken whole", shard_size=3, **OPTIONS)
    assert [row["name"] for row in rows_of(tmp_path / "taken whole")] == rows["name"][:11]


def test_a_stream_goes_into_one_file_too(model, rows, tmp_path):
    stream = rows.to_iterable_dataset(num_shards=2)
    assert extract_features(model, stream, tmp_path / "features.parquet", **OPTIONS) == 21
    assert pq.read_table(tmp_path / "features.parquet")["name"].to_pylist() == rows["name"][:]


def test_a_stream_without_types_has_those_of_its_first_rows(model, tmp_path):
    def images():
        for number in range(5):
            yield {"image": noise_image(number), "name": str(number)}

    stream = IterableDataset.from_generator(images)
    assert stream.features is None
    extract_features(model, stream, tmp_path / "features", **OPTIONS)
    assert [row["name"] for row in rows_of(tmp_path / "features")] == list("01234")


def test_what_is_there_is_not_made_again(model, rows, tmp_path, monkeypatch):
    target = tmp_path / "features"
    extract_features(model, rows, target, shard_size=4, **OPTIONS)
    whole = rows_of(target)
    names = [f"part-{number:05d}-of-00006.parquet" for number in (1, 4)]
    for name in names:
        (target / "shards" / name).unlink()
    (target / "shards" / ".part-00001-of-00006.parquet.abc").write_bytes(b"half")
    manifest = json.loads((target / "manifest.json").read_text())
    (target / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    made = []
    begin = Kept.begin
    monkeypatch.setattr(Kept, "begin", lambda self, values: made.append(len(values)) or begin(self, values))
    assert extract_features(model, rows, target, shard_size=4, resume=True, **OPTIONS) == 21
    assert sum(made) - 1 == 8  # one is the empty image that tells the shapes
    assert same(rows_of(target), whole)
    assert not [path for path in (target / "shards").iterdir() if path.name.startswith(".")]
    made.clear()
    assert extract_features(model, rows, target, shard_size=4, resume=True, **OPTIONS) == 21
    assert sum(made) == 1


def test_files_of_a_stream_that_are_done_are_not_read_again(model, rows, tmp_path, monkeypatch):
    read = []

    def images(files):
        for file in files:
            read.append(file)
            for number in range(5):
                yield {"image": noise_image(10 * file + number), "name": f"{file} {number}"}

    def stream():
        features = rows.features
        return IterableDataset.from_generator(images, gen_kwargs={"files": [0, 1, 2]}, features=features)

    begin, calls = Kept.begin, []

    def fail(self, values):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("out of memory")
        return begin(self, values)

    monkeypatch.setattr(Kept, "begin", fail)
    options = {**OPTIONS, "shard_size": 5, "num_workers": 0}
    with pytest.raises(RuntimeError, match="out of memory"):
        extract_features(model, stream(), tmp_path / "features", **options)
    assert len(list((tmp_path / "features" / "shards").iterdir())) == 1
    read.clear()
    extract_features(model, stream(), tmp_path / "features", resume=True, **options)
    assert read == [1, 2]
    assert [row["name"] for row in rows_of(tmp_path / "features")] == [f"{s} {i}" for s in range(3) for i in range(5)]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"pooling": "cls"}, 'kept was "mean" and is "cls"'),
        ({"shard_size": 5}, "size of a shard was 4 and is 5"),
        ({"normalize": True}, "normalized was false and is true"),
        ({"num_images": 20}, "images asked for was null and is 20"),
    ],
)
def test_another_run_does_not_go_on(model, rows, changed, named, tmp_path):
    extract_features(model, rows, tmp_path / "features", shard_size=4, **OPTIONS)
    before = rows_of(tmp_path / "features")
    with pytest.raises(OutputError, match=named):
        extract_features(model, rows, tmp_path / "features", **{"shard_size": 4, "resume": True, **OPTIONS, **changed})
    assert rows_of(tmp_path / "features") == before


def test_another_head_or_other_images_do_not_go_on(model, rows, vit, processor, tmp_path):
    extract_features(model, rows, tmp_path / "features", **OPTIONS)
    identity = SOAPModelWrapper.from_backbone(vit, None, image_processor=processor)
    with pytest.raises(OutputError, match="digest of the head was"):
        extract_features(identity, rows, tmp_path / "features", resume=True, **OPTIONS)
    other = rows.select(range(20, -1, -1))
    with pytest.raises(OutputError, match="digest of the first image was"):
        extract_features(model, other, tmp_path / "features", resume=True, **OPTIONS)


def test_a_folder_in_use_or_with_other_files_is_left_alone(model, rows, tmp_path):
    target = tmp_path / "features"
    extract_features(model, rows, target, shard_size=4, **OPTIONS)
    with pytest.raises(OutputError, match="holds features already; pass --resume"):
        extract_features(model, rows, target, shard_size=4, **OPTIONS)
    assert extract_features(model, rows, target, shard_size=10, overwrite=True, **OPTIONS) == 21
    assert len(list((target / "shards").iterdir())) == 3
    (target / "shards" / "mine.parquet").write_bytes(b"mine")
    for ways in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match=r"other files \(shards/mine.parquet\)"):
            extract_features(model, rows, target, shard_size=10, **ways, **OPTIONS)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        extract_features(model, rows, tmp_path / "file", **OPTIONS)


def test_killed_at_any_moment_and_resumed_it_is_whole(head, photos, tmp_path):
    options = [head, photos, "--shard-size", "5", "--batch-size", "5", "--quiet", "--num-workers", "0"]
    extract_features(str(head), photos, tmp_path / "whole", shard_size=5, batch_size=5, progress=False)
    target, kills = tmp_path / "killed", 0
    for shards in (3, 8):
        process = run(*options, "--output", target, *(["--resume"] if target.exists() else []))
        while process.poll() is None and len(list(target.glob("shards/part-*"))) < shards:
            time.sleep(0.005)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in target.glob("shards/part-*"):
            assert pq.read_metadata(path).num_rows > 0
    assert kills
    finished(run(*options, "--output", target, "--resume"))
    assert same(rows_of(target), rows_of(tmp_path / "whole"))


def test_a_signal_is_said_and_the_second_run_at_one_time_refused(head, photos, tmp_path, monkeypatch):
    target = tmp_path / "features"
    monkeypatch.setattr("soap_hf.extract.folder.LOCK_SECONDS", 0.1)
    many = ["--shard-size", "2", "--batch-size", "2", "--num-workers", "0", "--quiet"]
    process = run(head, photos, "--output", target, *many)
    while process.poll() is None and not list(target.glob("shards/part-*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(OutputError, match="Another run is writing into"):
        extract_features(str(head), photos, target, shard_size=2, resume=True, progress=False)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "Interrupted by SIGTERM: complete shards are in" in output
    assert not [path for path in (target / "shards").iterdir() if path.name.startswith(".")]


def test_unreadable_images_are_named_in_the_manifest(model, rows, tmp_path):
    files = [noise_image(seed) for seed in range(12)]
    broken = Dataset.from_dict({"image": files}).cast_column("image", rows.features["image"].__class__(decode=False))
    values = broken["image"][:]
    values[0] = values[5] = {"bytes": b"no image", "path": None}
    broken = Dataset.from_dict({"image": values}, features=broken.features)
    assert extract_features(model, broken, tmp_path / "features", shard_size=1, max_bad_fraction=0.2, **OPTIONS) == 10
    manifest = json.loads((tmp_path / "features" / "manifest.json").read_text())
    assert [one["name"] for one in manifest["unreadable"]] == ["row 0", "row 5"]
    assert [row["row"] for row in rows_of(tmp_path / "features")] == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"every": 2}, "every=… and inside=… choose among patch tokens"),
        ({"stored_as": "int8"}, "stored_as must be one of"),
        ({"stored_as": "bfloat16"}, "Parquet has no bfloat16"),
        ({"resume": True, "overwrite": True}, "pass one of them"),
        ({"layer": 3}, "cleans no layer 3"),
        ({"shard_size": "0"}, "no size of a shard"),
        ({"patches": True, "inside": "mask"}, "no column 'mask'"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(model, rows, options, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(SOAPModelWrapper, "forward", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(SOAPError, match=sentence):
        extract_features(model, rows, tmp_path / "features", **options, **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_an_endless_stream_needs_a_number(model, rows, tmp_path):
    stream = rows.to_iterable_dataset().repeat(None)
    with pytest.raises(DataError, match="repeats itself for ever"):
        extract_features(model, stream, tmp_path / "features", **OPTIONS)
    assert extract_features(model, stream, tmp_path / "features", num_images=30, **OPTIONS) == 30


def test_a_file_that_is_written_whole_is_not_resumed(head, photos, tmp_path):
    result = CliRunner().invoke(
        app, ["extract", str(head), str(photos), "--output", str(tmp_path / "features.parquet"), "--resume"]
    )
    assert isinstance(result.exception, OutputError)
