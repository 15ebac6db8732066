"""Planted objects are found, with every method by one rule; odd images and masks are counted, and nothing breaks."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from soap_hf import SOAPModelWrapper, SOAPProjection, SOAPStatistics
from soap_hf.evaluation import salient_object
from soap_hf.evaluation.bilateral_solver import BilateralGrid
from soap_hf.evaluation.comparison import Comparison
from soap_hf.evaluation.examples import Examples
from soap_hf.evaluation.saliency import METRICS, evaluate_saliency
from soap_hf.evaluation.saliency_metrics import f_measures
from soap_hf.evaluation.salient_object import coarse_mask, in_whole_patches, raw_grid, resized
from soap_hf.runtime.errors import BackboneError, DataError, HeadError, NonFiniteTokensError
from tests.conftest import noise_image
from tests.tiny_backbones import TINY_BACKBONES

GREEN, RED = (20, 200, 40), (220, 30, 20)
BOXES = ((16, 8, 48, 40), (0, 0, 24, 24), (40, 24, 72, 56))


def scene(box, size=(80, 64)):
    """A red rectangle (left, top, right, bottom) on green, and its mask."""
    image, mask = Image.new("RGB", size, GREEN), Image.new("L", size)
    image.paste(RED, box)
    mask.paste(255, box)
    return image, mask


def scenes(*pairs):
    """A data set of images and masks; by default three scenes."""
    images, masks = zip(*(pairs or map(scene, BOXES)), strict=True)
    return Dataset.from_dict({"image": list(images), "mask": list(masks)})


def evaluated(comparison, dataset=None, resize_masks=True, **kwargs):
    examples = Examples(dataset or scenes(), mask_column="mask", resize_masks=resize_masks)
    return evaluate_saliency(comparison, examples, progress=False, **kwargs)


@pytest.fixture
def model(vit, projection, processor):
    """A head on the tiny ViT, without anything of the positions in its tokens."""
    torch.nn.init.zeros_(vit.embeddings.position_embeddings)
    return SOAPModelWrapper.from_backbone(vit, projection, image_processor=processor)


@pytest.fixture
def comparison(model):
    return Comparison.of(model)


def test_tokens_that_all_point_one_way_are_divided_once_centred(vit, projection, processor):
    torch.nn.init.zeros_(vit.embeddings.position_embeddings)
    vit.layernorm.bias.data[0] = 1000
    model = SOAPModelWrapper.from_backbone(vit, projection, image_processor=processor)
    images = processor([image for image, _ in map(scene, BOXES)], return_tensors="pt")
    with torch.no_grad():
        tokens = model.patch_tokens(images["pixel_values"], raw=True)
    without = Comparison.of(model)
    with pytest.raises(HeadError, match="without statistics"):
        evaluated(without, centred=True)
    model.set_statistics({-1: SOAPStatistics.from_tokens(tokens, tokens)})
    comparison = Comparison.of(model)
    assert evaluated(comparison).summary["counts"]["undivided_raw"] == 3
    centred = evaluated(comparison, centred=True).summary
    assert centred["counts"]["undivided_raw"] == 0
    assert centred["means"]["raw"]["iou"] > 0.9
    assert centred["settings"]["centred"]


def test_planted_objects_are_found(comparison):
    name, rows, found = evaluated(comparison, command="again")
    assert name == "saliency"
    for method in ("raw", "soap"):
        assert set(found["means"][method]) == set(METRICS)
        assert found["means"][method]["iou"] == found["means"][method]["accuracy"] == 1
        assert min(found["means"][method].values()) > 0.99
    assert found["differences"]["soap"]["iou"] == (0, 0, 0)
    assert found["command"] == "again"
    assert found["settings"]["image_size"] == "own"
    assert found["counts"]["images"] == len(rows) == 3
    assert not found["counts"]["undivided_raw"]


def test_rows_have_the_arms_side_by_side(comparison):
    rows, found = evaluated(comparison)[1:]
    columns = list(rows[0])
    assert columns[:5] == ["image", "raw_iou", "soap_iou", "raw_iou_bilateral", "soap_iou_bilateral"]
    assert columns[1:] == [f"{method}_{metric}" for metric in METRICS for method in ("raw", "soap")]
    for column in columns[1:]:
        method, _, metric = column.partition("_")
        assert found["means"][method][metric] == pytest.approx(np.mean([row[column] for row in rows]))


def test_without_the_solver_the_rest_stays_as_it_is(comparison):
    with_solver, without = evaluated(comparison), evaluated(comparison, bilateral=False)
    assert not any("bilateral" in column for column in without.rows[0])
    assert without.summary["settings"]["bilateral"] is False
    for before, after in zip(with_solver.rows, without.rows, strict=True):
        assert before.items() >= after.items()


def test_arms_that_remove_nothing_do_not_differ(model):
    dataset = scenes(*((noise_image(seed), scene((8, 8, 24, 24), (40, 32))[1]) for seed in range(4)))
    comparison = Comparison.of(model)
    comparison = dataclasses.replace(
        comparison, methods={name: SOAPProjection.identity(32) for name in comparison.methods}
    )
    for row in evaluated(comparison, dataset).rows:
        assert all(row[f"raw_{metric}"] == row[f"soap_{metric}"] for metric in METRICS)


def test_the_backbone_sees_an_image_once_in_its_own_size_with_mean_and_std_alone(model, vit):
    model._image_processor.image_mean = [0.1, 0.2, 0.3]
    model._image_processor.image_std = [0.5, 0.6, 0.7]
    image = noise_image(0, (61, 45))
    comparison = Comparison.of(model)
    seen = []
    vit.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True)
    evaluated(comparison, scenes((image, Image.new("L", image.size, 255)), scene(BOXES[0])))
    assert [tuple(pixels.shape) for pixels in seen] == [(1, 3, 48, 64), (1, 3, 64, 80)]
    rgb = np.array(image.resize((64, 48), Image.Resampling.LANCZOS)) / 255
    expected = (rgb - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    assert seen[0][0].permute(1, 2, 0).numpy() == pytest.approx(expected, abs=1e-5)


def test_a_head_without_image_processor_has_the_documented_default(vit, projection):
    torch.nn.init.zeros_(vit.embeddings.position_embeddings)
    comparison = Comparison.of(SOAPModelWrapper.from_backbone(vit, projection))
    pixels = comparison.preprocess.normalize(torch.full((1, 3, 2, 2), 0.456))
    assert pixels[0, 1] == pytest.approx(torch.zeros(2, 2), abs=1e-5)
    assert evaluated(comparison).summary["means"]["raw"]["iou"] == 1


def test_max_f_is_the_maximum_of_the_mean_curve(comparison):
    dataset = scenes(*((noise_image(seed), scene((8, 8, 24, 24), (40, 32))[1]) for seed in range(4)), scene(BOXES[0]))
    found = evaluated(comparison, dataset)
    curves = []
    for row in dataset:
        tokens = raw_grid(comparison, resized(row["image"], in_whole_patches(row["image"].size[::-1], 8)))
        mask = coarse_mask(comparison.methods["soap"](tokens), row["image"].size[::-1])
        refined = BilateralGrid(np.array(row["image"])).refine(mask).clip(0, 1)
        curves.append(f_measures(refined, np.array(row["mask"]) > 127))
    assert found.summary["means"]["soap"]["max_f_bilateral"] == pytest.approx(np.mean(curves, axis=0).max())


def test_odd_images_are_counted_and_break_nothing(comparison, caplog):
    one_colour = Image.new("RGB", (40, 32), GREEN), scene((0, 0, 8, 8), (40, 32))[1]
    no_object = Image.new("RGB", (40, 32), RED), Image.new("L", (40, 32))
    smaller_than_a_patch = noise_image(0, (5, 3)), Image.new("L", (5, 3), 255)
    grey = scene(BOXES[0])[0].convert("L"), scene(BOXES[0])[1]
    rows, found = evaluated(comparison, scenes(one_colour, no_object, smaller_than_a_patch, grey))[1:]
    counts = found["counts"]
    assert (counts["images"], counts["empty_masks"], counts["shrunk_images"]) == (3, 1, 0)
    assert counts["undivided_raw"] == counts["undivided_soap"] == 2
    assert [row["raw_iou"] for row in rows] == [0, 0, 1]
    assert [row["soap_iou_bilateral"] for row in rows][:2] == [0, 0]
    assert all(np.isfinite(list(row.values())[1:]).all() for row in rows)
    assert "1 images have an empty mask, and are left out: row 1." in caplog.text
    assert "In 2 images no object is found by soap tokens (" in caplog.text


def test_large_images_are_shrunk_for_the_backbone_alone(comparison, monkeypatch):
    monkeypatch.setattr(salient_object, "MAX_PATCHES", 20)
    dataset = scenes(scene((0, 0, 40, 64)), scene((0, 0, 8, 8), (24, 24)))
    rows, found = evaluated(comparison, dataset)[1:]
    assert found["counts"]["shrunk_images"] == 1
    assert [row["raw_iou_bilateral"] for row in rows] == [1, 1]


@pytest.mark.parametrize(("height", "width"), [(300, 400), (7, 7), (1, 4000), (3000, 4000), (9000, 13)])
def test_sizes_are_whole_patches_near_the_image(height, width):
    rows, columns = in_whole_patches((height, width), 14)
    assert rows % 14 == columns % 14 == 0
    assert min(rows, columns) >= 14
    assert rows * columns <= 1.1 * 4096 * 14**2
    if height * width < 4096 * 14**2:
        assert abs(rows - max(14, height)) <= 7
        assert abs(columns - max(14, width)) <= 7


def test_masks_of_another_size_are_resized_or_refused(comparison):
    image, mask = scene((16, 8, 48, 40))
    dataset = scenes((image, mask.resize((40, 32), Image.Resampling.NEAREST)), scene(BOXES[1]))
    assert evaluated(comparison, dataset).summary["means"]["raw"]["iou"] == 1
    with pytest.raises(DataError, match=r"mask of row 0 has 40 x 32 pixels, but the image 80 x 64"):
        evaluated(comparison, dataset, resize_masks=False)


def test_examples_without_masks_are_refused(comparison):
    with pytest.raises(DataError, match="row 0 has no mask; give a folder of masks, or name the mask column"):
        evaluate_saliency(comparison, Examples(scenes()), progress=False)


def test_nan_is_refused(comparison, vit):
    torch.nn.init.constant_(vit.layernorm.weight, torch.nan)
    with pytest.raises(NonFiniteTokensError):
        evaluated(comparison)


@pytest.mark.parametrize("name", ["convnext", "swin", "timesformer", "sam2_vision_model", "siglip2_vision_model"])
def test_maps_clips_and_packed_patches_have_rows_and_columns(name):
    tiny = TINY_BACKBONES[name]
    comparison = Comparison.of(SOAPModelWrapper.from_backbone(tiny.build(), None))
    size = tiny.other_size or tiny.size
    tokens = raw_grid(comparison, torch.randint(0, 256, (3, *size), dtype=torch.uint8))
    assert tokens.shape[:2] == (tiny.other_grid or tiny.grid)[-2:]
    assert tokens.ndim == 3


def test_a_backbone_of_one_size_says_so_and_takes_it():
    tiny = TINY_BACKBONES["pvt"]
    comparison = Comparison.of(SOAPModelWrapper.from_backbone(tiny.build(), None))
    with pytest.raises(BackboneError, match=r"cannot take images of .* pixels .*; pass an image_size that it takes"):
        evaluated(comparison)
    assert evaluated(comparison, image_size=tiny.size).summary["settings"]["image_size"] == list(tiny.size)


@pytest.fixture
def folders(tmp_path):
    """Three scenes in two folders."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number, box in enumerate(BOXES):
        image, mask = scene(box)
        image.save(tmp_path / "images" / f"{number}.png")
        mask.save(tmp_path / "masks" / f"{number}.bmp")
    return tmp_path / "images", tmp_path / "masks"


@pytest.fixture
def head(model, vit, tmp_path):
    vit.save_pretrained(tmp_path / "vit")
    model.config.backbone_name_or_path = str(tmp_path / "vit")
    model.save_pretrained(tmp_path / "head")
    return tmp_path / "head"


def test_command_line_writes_a_row_an_image(run, head, folders, tmp_path):
    status, out, _ = run("evaluate", "saliency", head, *folders, "--output", "out", "--quiet")
    assert status == 0
    assert "iou_bilateral" in out
    with open(tmp_path / "out" / "saliency.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert [row["image"] for row in rows] == ["0.png", "1.png", "2.png"]
    assert [float(row["raw_iou"]) for row in rows] == [1, 1, 1]
    assert list(found["means"]) == ["raw", "soap"]
    assert found["differences"]["soap"]["iou"] == {"mean": 0, "low": 0, "high": 0}
    assert found["command"].startswith("soap-hf evaluate saliency ")


def test_command_line_takes_columns_and_one_size(run, head, tmp_path):
    scenes().rename_column("mask", "truth").save_to_disk(tmp_path / "columns")
    options = ("--mask-column", "truth", "--no-bilateral", "--image-size", "64x80", "--num-images", 2)
    status, out, _ = run("evaluate", "saliency", head, tmp_path / "columns", *options, "--output", "out")
    assert status == 0
    assert "bilateral" not in out
    found = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert found["counts"]["images"] == 2
    assert found["settings"]["image_size"] == [64, 80]


def test_command_line_refuses_folders_that_do_not_pair_up(refused, head, folders):
    images, masks = folders
    command = ("evaluate", "saliency", head, images, masks)
    (masks / "1.bmp").rename(masks / "one.bmp")
    assert "1 of 3 files have no mask of the same name (1.png)" in refused(*command)
    (images / "1.png").unlink()
    assert "1 of 3 files have no image of the same name (one.bmp)" in refused(*command)
    for path in (images / "2.png", masks / "2.bmp", masks / "one.bmp"):
        path.unlink()
    assert "2 images are needed" in refused(*command)


def test_command_line_refuses_masks_of_another_size_on_request(run, head, folders):
    Image.new("L", (8, 8), 255).save(folders[1] / "1.bmp")
    status, out, err = run("evaluate", "saliency", head, *folders, "--same-size", "--quiet")
    assert (status, out) == (1, "")
    assert "has 8 x 8 pixels, but the image 80 x 64" in err
    assert run("evaluate", "saliency", head, *folders, "--quiet")[0] == 0
