"""What is kept of each image: layers, patch tokens, those inside a mask, raw ones beside, in the dtype asked for."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import ViTImageProcessorPil

from soap_hf import SOAPModelWrapper
from soap_hf.extract.extraction import extract_features
from soap_hf.runtime.errors import DataError, NonFiniteTokensError
from tests.conftest import noise_image, random_projection

OPTIONS = {"batch_size": 4, "progress": False}


@pytest.fixture
def deep(vit, processor):
    """A head on two layers."""
    projections = {layer: random_projection(32, rank=3) for layer in (1, -1)}
    return SOAPModelWrapper.from_backbone(vit, projections, image_processor=processor)


@pytest.fixture
def images():
    return [noise_image(seed) for seed in range(6)]


@pytest.fixture
def rows(images):
    """Images with masks: nothing, everything, the left half, the right half, a corner, a dot."""
    shapes = [None, (0, 0, 64, 64), (0, 0, 31, 64), (32, 0, 64, 64), (0, 0, 15, 15), (3, 3, 4, 4)]
    masks = []
    for image, box in zip(images, shapes, strict=True):
        mask = Image.new("L", (64, 64))
        if box:
            ImageDraw.Draw(mask).rectangle(box, fill=255)
        masks.append(mask.resize(image.size, Image.Resampling.NEAREST))
    return Dataset.from_dict({"image": images, "mask": masks})


def tokens(model, images, layer=-1, raw=False):
    """Patch tokens `(6, 4, 4, 32)`, as the wrapper gives them."""
    pixels = model.image_processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model.patch_tokens(pixels, layer, raw=raw)


def written(model, rows, target, **options):
    extract_features(model, rows, target, **OPTIONS, **options)
    return pq.read_table(target)


def test_layers_and_raw_features_come_from_one_pass(deep, images, rows, tmp_path, monkeypatch):
    passes, forward = [], SOAPModelWrapper.forward
    monkeypatch.setattr(SOAPModelWrapper, "forward", lambda self, *a, **k: passes.append(1) or forward(self, *a, **k))
    table = written(deep, rows, tmp_path / "features.parquet", layer=[1, -1], with_raw=True)
    assert len(passes) == 1 + 2  # an empty image, and two batches
    monkeypatch.undo()
    for name in ("features_1", "raw_features_1", "features_-1", "raw_features_-1"):
        layer, raw = int(name.rpartition("_")[2]), name.startswith("raw")
        expected = tokens(deep, images, layer, raw).flatten(1, 2).mean(dim=1)
        torch.testing.assert_close(torch.tensor(table[name].to_pylist()), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match=r"The head cleans layers .* choose with layer="):
        written(deep, rows, tmp_path / "features.parquet")


def test_patch_tokens_are_whole_and_half_as_long(model, images, rows, tmp_path):
    table = written(model, rows, tmp_path / "features.parquet", patches=True)
    assert str(table.schema.field("features").type) == "list<element: fixed_size_list<element: halffloat>[32]>"
    found = torch.tensor([[list(map(float, token)) for token in row] for row in table["features"].to_pylist()])
    torch.testing.assert_close(found.view(6, 4, 4, 32), tokens(model, images), rtol=1e-3, atol=1e-3)


def test_every_other_patch_is_numbered(model, images, rows, tmp_path):
    table = written(model, rows, tmp_path / "features.parquet", patches=True, every=2, stored_as="float32")
    assert table["patches"].to_pylist() == [[0, 2, 8, 10]] * 6
    expected = tokens(model, images)[:, ::2, ::2].flatten(1, 2)
    torch.testing.assert_close(torch.tensor(table["features"].to_pylist()), expected)
    extract_features(model, rows, tmp_path / "f.safetensors", patches=True, every=2, **OPTIONS)
    tensors = load_file(tmp_path / "f.safetensors")
    assert tensors["patches"].tolist() == [0, 2, 8, 10]
    torch.testing.assert_close(tensors["features"].float(), expected, rtol=1e-3, atol=1e-3)


def test_patches_inside_the_mask(model, images, rows, tmp_path):
    table = written(model, rows, tmp_path / "f.parquet", patches=True, inside="mask", stored_as="float32")
    left = [row * 4 + column for row in range(4) for column in (0, 1)]
    right = [number + 2 for number in left]
    assert table["patches"].to_pylist() == [[], list(range(16)), left, right, [0], []]
    whole = tokens(model, images).flatten(1, 2)
    for row, numbers, found in zip(whole, table["patches"].to_pylist(), table["features"].to_pylist(), strict=True):
        torch.testing.assert_close(torch.tensor(found).view(-1, 32), row[numbers])
    assert "mask" not in table.column_names
    with pytest.raises(DataError, match="different numbers of patches"):
        extract_features(model, rows, tmp_path / "f.safetensors", patches=True, inside="mask", **OPTIONS)


def test_a_mask_is_cropped_as_its_image(vit, projection, images, rows, tmp_path):
    cropping = ViTImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=True)
    cropping.crop_size = {"height": 32, "width": 32}
    model = SOAPModelWrapper.from_backbone(vit, projection, image_processor=cropping)
    pixels = cropping(images[0].convert("RGB"), return_tensors="pt")["pixel_values"]
    assert pixels.shape[-1] == 32
    table = written(model, rows, tmp_path / "f.parquet", patches=True, inside="mask")
    left = [row * 4 + column for row in range(4) for column in (0, 1)]
    # of the middle of the image, the corner and the dot show nothing
    assert table["patches"].to_pylist() == [[], list(range(16)), left, [number + 2 for number in left], [], []]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_safetensors_of_any_dtype(model, images, rows, dtype, tmp_path):
    extract_features(model, rows, tmp_path / "f.safetensors", stored_as=dtype, with_raw=True, **OPTIONS)
    tensors = load_file(tmp_path / "f.safetensors")
    for name, raw in (("features", False), ("raw_features", True)):
        assert str(tensors[name].dtype) == f"torch.{dtype}"
        expected = tokens(model, images, raw=raw).flatten(1, 2).mean(dim=1)
        torch.testing.assert_close(tensors[name].float(), expected, rtol=1e-2, atol=1e-2)
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert json.loads(file.metadata()["soap_hf"])["stored as"] == dtype


@pytest.mark.parametrize("patches", [False, True])
def test_normalised_vectors_have_length_one(model, rows, patches, tmp_path):
    extract_features(
        model, rows, tmp_path / "f.safetensors", normalize=True, patches=patches, stored_as="float32", **OPTIONS
    )
    lengths = load_file(tmp_path / "f.safetensors")["features"].norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_nan_is_refused(model, rows, tmp_path):
    with torch.no_grad():
        next(model.backbone.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteTokensError, match="The features hold NaN"):
        written(model, rows, tmp_path / "features.parquet")
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_into_16_bits_is_refused(model, rows, tmp_path):
    with torch.no_grad():
        model.backbone.layernorm.weight.fill_(1e6)
    with pytest.raises(DataError, match="too large for float16; store them as float32, or normalized"):
        written(model, rows, tmp_path / "features.parquet", stored_as="float16")
    assert list(tmp_path.iterdir()) == []
    written(model, rows, tmp_path / "features.parquet", stored_as="float16", normalize=True)


def test_other_images_are_left_out_and_that_is_said(model, rows, tmp_path, caplog):
    table = written(model, rows.add_column("note", list("abcdef")), tmp_path / "features.parquet")
    assert table.column_names == ["note", "row", "file_name", "features"]
    assert "left out of the features: mask" in caplog.text
