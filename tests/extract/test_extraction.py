"""Extracted features are those of the wrapper, in order, beside the columns of the data set; or there is no file."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Array2D, ClassLabel, Dataset, Features, Image, List, Value, load_dataset
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from soap_hf import SOAPModelWrapper
from soap_hf.cli.app import app
from soap_hf.extract.extraction import extract_features
from soap_hf.runtime.errors import DataError, OutputError, SOAPError
from tests.conftest import noise_image


@pytest.fixture
def labelled():
    """21 images with names and classes."""
    columns = {
        "image": [noise_image(seed) for seed in range(21)],
        "name": [f"image {number}" for number in range(21)],
        "label": [number % 3 for number in range(21)],
    }
    return Dataset.from_dict(columns).cast_column("label", ClassLabel(names=["cat", "dog", "tree"]))


def expected(model, images, **options):
    pixels = model.image_processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model(pixels, **options)


@pytest.mark.parametrize("pooling", ["mean", "cls", "cls+mean"])
def test_parquet_holds_pooled_features_and_the_other_columns(model, labelled, pooling, tmp_path):
    target = tmp_path / "features.parquet"
    assert extract_features(model, labelled, target, pooling=pooling, batch_size=4, progress=False) == 21
    loaded = load_dataset("parquet", data_files=str(target), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == ["name", "label", "row", "file_name", "features"]
    assert loaded["row"][:] == list(range(21))
    assert loaded["name"] == labelled["name"]
    assert loaded.features["label"] == labelled.features["label"]
    features = torch.tensor(loaded["features"][:])
    torch.testing.assert_close(features, expected(model, labelled["image"], pooling=pooling).image_embeds)


def test_safetensors_holds_patch_tokens_and_numbers(model, labelled, tmp_path):
    target = tmp_path / "features.safetensors"
    extract_features(model, labelled, target, pooling=None, stored_as="float32", batch_size=4, progress=False)
    tensors = load_file(target)
    assert set(tensors) == {"features", "rows", "label"}
    tokens = expected(model, labelled["image"]).last_hidden_state[:, 1:]
    torch.testing.assert_close(tensors["features"], tokens.unflatten(1, (4, 4)))
    assert tensors["label"].tolist() == labelled["label"][:]
    assert tensors["rows"].tolist() == list(range(21))
    assert [path.name for path in tmp_path.iterdir()] == ["features.safetensors"]


@pytest.mark.parametrize("ending", [".parquet", ".safetensors"])
def test_unreadable_images_are_left_out_and_nothing_shifts(model, labelled, ending, tmp_path):
    files = labelled.cast_column("image", Image(decode=False))["image"][:]
    files[0] = files[7] = {"bytes": b"no image", "path": None}
    broken = Dataset.from_dict({"image": files, "label": labelled["label"][:]})
    target = tmp_path / f"features{ending}"
    assert extract_features(model, broken, target, batch_size=4, max_bad_fraction=0.2, progress=False) == 19
    rows = [row for row in range(21) if row not in (0, 7)]
    whole = expected(model, labelled["image"], pooling="mean").image_embeds[rows]
    if ending == ".parquet":
        table = pq.read_table(target)
        labels, features = table["label"].to_pylist(), torch.tensor(table["features"].to_pylist())
    else:
        tensors = load_file(target)
        labels, features = tensors["label"].tolist(), tensors["features"]
        assert tensors["rows"].tolist() == rows
    assert labels == [row % 3 for row in rows]
    torch.testing.assert_close(features, whole)


@pytest.mark.parametrize("ending", [".parquet", ".safetensors"])
def test_a_run_that_fails_leaves_nothing_and_an_older_file_alone(model, labelled, ending, tmp_path, monkeypatch):
    target = tmp_path / f"features{ending}"
    target.write_bytes(b"older")
    calls = []

    def fail_late(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return forward(self, *arguments, **options)

    forward = SOAPModelWrapper.forward
    monkeypatch.setattr(SOAPModelWrapper, "forward", fail_late)
    with pytest.raises(RuntimeError, match="out of memory"):
        extract_features(model, labelled, target, batch_size=4, progress=False)
    assert target.read_bytes() == b"older"
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_bad_input_is_refused_before_the_model_runs(model, labelled, tmp_path, monkeypatch):
    monkeypatch.setattr(SOAPModelWrapper, "forward", lambda *_, **__: pytest.fail("the model ran"))
    target = tmp_path / "features.parquet"
    for dataset, output, options, error, sentence in [
        (labelled, tmp_path / "features.csv", {}, OutputError, "ends in .parquet or .safetensors, not 'features.csv'"),
        (labelled, tmp_path / "nowhere" / "features.parquet", {}, OutputError, "Cannot write"),
        (labelled, target, {"pooling": "max"}, DataError, "pooling must be one of"),
        (labelled, target, {"image_column": "photo"}, DataError, "no column 'photo'"),
        (labelled.rename_column("label", "features"), target, {}, DataError, "a column 'features' already"),
    ]:
        with pytest.raises(error, match=sentence):
            extract_features(model, dataset, output, progress=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_of_broken_files_gives_no_file(model, tmp_path):
    broken = Dataset.from_dict({"image": [{"bytes": b"no", "path": None}] * 3}).cast_column("image", Image())
    with pytest.raises(DataError, match="no readable image"):
        extract_features(model, broken, tmp_path / "features.parquet", max_bad_fraction=1, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_file_and_refuses_to_overwrite_one(mae_folder, photos, tmp_path):
    head, output = tmp_path / "head", tmp_path / "features.safetensors"
    SOAPModelWrapper.from_backbone(str(mae_folder), None).save_pretrained(head)
    run = CliRunner().invoke
    arguments = ["extract", str(head), str(photos), "--output", str(output), "--pooling", "cls+mean"]
    result = run(app, arguments)
    assert result.exit_code == 0, result.output
    assert "Features of 64 images written to" in result.output
    assert load_file(output)["features"].shape == (64, 2 * 192)
    assert isinstance(run(app, arguments).exception, SOAPError)
    assert run(app, [*arguments, "--overwrite", "--quiet"]).output == ""


@pytest.mark.parametrize("ending", [".parquet", ".safetensors"])
def test_each_row_says_which_file_it_is_of(model, ending, tmp_path):
    folder, names = tmp_path / "birds", ["crane/1.png", "crane/2.png", "ibis/1.png", "ibis/3.png"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(len(name)).save(folder / name)
    (folder / "crane/2.png").write_bytes(b"no image")
    target = tmp_path / f"features{ending}"
    assert extract_features(model, folder, target, progress=False) == 3
    kept = [name for name in names if name != "crane/2.png"]
    if ending == ".parquet":
        table = pq.read_table(target)
        found, rows = table["file_name"].to_pylist(), table["row"].to_pylist()
    else:
        with safe_open(target, "pt") as file:
            found, rows = json.loads(file.metadata()["file_names"]), file.get_tensor("rows").tolist()
    assert (found, rows) == (kept, [0, 2, 3])


@pytest.mark.parametrize("given", ["set/birds", ".", "../set/birds"])
def test_file_names_lie_below_the_folder_however_it_is_given(given, model, tmp_path, monkeypatch):
    birds = tmp_path / "set" / "birds"
    (birds / "crane").mkdir(parents=True)
    for name in ("1.png", "crane/2.png"):
        noise_image(len(name)).save(birds / name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir({".": birds, "../set/birds": tmp_path / "elsewhere"}.get(given, tmp_path))
    assert extract_features(model, given, tmp_path / "features.parquet", progress=False) == 2
    found = pq.read_table(tmp_path / "features.parquet")["file_name"].to_pylist()
    assert found == ["1.png", "crane/2.png"]


@pytest.mark.parametrize("ending", [".parquet", ".safetensors"])
def test_columns_of_any_kind_are_kept_or_left_out(model, labelled, ending, tmp_path):
    grids = [[[number, 1], [2, 3]] for number in range(21)]
    kinds = {
        "grid": (grids, Array2D((2, 2), "int32")),
        "boxes": (grids, List(List(Value("int64")))),
        "text": ([None, *"abcdefghijklmnopqrst"], Value("string")),
        "share": ([None, *map(float, range(20))], Value("float32")),
        "raw": ([b"x"] * 21, Value("binary")),
    }
    columns = {"image": labelled["image"][:], **{name: values for name, (values, _) in kinds.items()}}
    features = Features({"image": Image(), **{name: kind for name, (_, kind) in kinds.items()}})
    rows, target = Dataset.from_dict(columns, features=features), tmp_path / f"features{ending}"
    extract_features(model, rows, target, batch_size=4, progress=False)
    if ending == ".parquet":
        loaded = load_dataset("parquet", data_files=str(target), split="train", cache_dir=str(tmp_path / "cache"))
        assert {name: loaded.features[name] for name in kinds} == {name: kind for name, (_, kind) in kinds.items()}
        assert all(loaded[name][:] == values for name, (values, _) in kinds.items())
    else:
        assert set(load_file(target)) == {"features", "rows", "share"}


def test_whole_numbers_that_lack_are_kept_in_parquet_and_refused_in_tensors(model, labelled, tmp_path):
    rows = labelled.add_column("age", [None, *range(20)])
    extract_features(model, rows, tmp_path / "features.parquet", progress=False)
    assert pq.read_table(tmp_path / "features.parquet")["age"].to_pylist() == [None, *range(20)]
    with pytest.raises(DataError, match="Column 'age' lacks a whole number in some rows"):
        extract_features("no head is looked for", rows, tmp_path / "features.safetensors")
