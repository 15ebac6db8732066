"""Patches get the class of most of their pixels, overlaps are counted by hand, and colours segment."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from soap_hf import SOAPModelWrapper
from soap_hf.evaluation.comparison import Comparison
from soap_hf.evaluation.examples import Examples
from soap_hf.evaluation.segmentation import (
    Overlap,
    evaluate_segmentation,
    mean_iou_resamples,
    patch_classes,
    patch_of_pixel,
)
from soap_hf.runtime.errors import DataError, LayoutError, SOAPError
from tests.tiny_backbones import TINY_BACKBONES

properties = settings(max_examples=40, deadline=None, derandomize=True)
GREEN, RED, IGNORED = 3, 7, 255
COLOURS = {GREEN: (20, 200, 40), RED: (220, 30, 20), IGNORED: (0, 0, 250)}


def picture(classes):
    """An image of 32 x 32 pixels and its mask: a class for each of 16 patches."""
    mask = torch.tensor(classes).view(4, 4).repeat_interleave(8, dim=0).repeat_interleave(8, dim=1)
    image = torch.zeros(32, 32, 3, dtype=torch.uint8)
    for label, colour in COLOURS.items():
        image[mask == label] = torch.tensor(colour, dtype=torch.uint8)
    return Image.fromarray(image.numpy()), Image.fromarray(mask.to(torch.uint8).numpy())


def pictures(*rows):
    """A data set of such images."""
    images, masks = zip(*map(picture, rows), strict=True)
    return Dataset.from_dict({"image": list(images), "mask": list(masks)})


def masked(dataset, **kwargs):
    return Examples(dataset, mask_column="mask", **kwargs)


HALVES = pictures([GREEN] * 8 + [RED] * 8, [RED] * 8 + [GREEN] * 8, [GREEN, RED] * 8, [RED, RED, GREEN, GREEN] * 4)
CHECKED = pictures([GREEN, RED, RED, GREEN] * 4, [RED] * 4 + [GREEN] * 12, [GREEN] * 8 + [RED] * 8)


@pytest.fixture
def comparison(vit, projection, processor):
    """Raw and clean on the tiny ViT, with nothing of the positions in its tokens."""
    torch.nn.init.zeros_(vit.embeddings.position_embeddings)
    return Comparison.of(SOAPModelWrapper.from_backbone(vit, projection, image_processor=processor))


@properties
@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.data())
def test_every_patch_has_its_pixels(size, data):
    grid = tuple(data.draw(st.integers(1, length)) for length in size)
    places = patch_of_pixel(size, grid)
    assert places.shape == size
    counts = places.flatten().bincount(minlength=grid[0] * grid[1])
    assert len(counts) == grid[0] * grid[1]
    assert counts.min() > 0
    rows, columns = (size[0] // grid[0], size[1] // grid[1])
    assert counts.max() <= (rows + 1) * (columns + 1)


def test_patches_of_whole_strides_are_squares():
    patches = torch.nn.functional.unfold(patch_of_pixel((24, 16), (3, 2))[None, None].float(), 8, stride=8)[0].T
    assert torch.equal(patches, torch.arange(6.0)[:, None].expand(-1, 64))


@properties
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 5))
def test_a_patch_has_the_class_of_most_pixels(seed, rows, columns):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 5, 900])[torch.randint(3, (rows * 4, columns * 3), generator=generator)]
    patches = torch.nn.functional.unfold(labels[None, None].float(), (4, 3), stride=(4, 3))[0].T
    assert torch.equal(patch_classes(labels, (rows, columns)), patches.long().mode(dim=1).values)


@pytest.mark.parametrize(
    ("truth", "guess", "accuracy", "mean_iou"),
    [
        ([1, 1, 2, 2], [1, 1, 2, 2], 1, 1),
        ([1, 1, 2, 2], [2, 2, 1, 1], 0, 0),
        ([1, 1, 2, 2], [1, 1, 1, 1], 1 / 2, (2 / 4 + 0) / 2),
        ([1, 1, 1, 1], [1, 9, 1, 1], 3 / 4, (3 / 4 + 0) / 2),
        ([0, 0, 0, 5], [0, 0, 5, 5], 3 / 4, (2 / 3 + 1 / 2) / 2),
    ],
)
def test_overlaps_are_counted(truth, guess, accuracy, mean_iou):
    overlap = Overlap.of(torch.tensor(truth), torch.tensor(guess))
    assert overlap.accuracy() == pytest.approx(accuracy)
    assert overlap.mean_iou() == pytest.approx(mean_iou)


def test_the_mean_iou_is_that_of_all_pixels_together():
    pairs = [torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]), torch.tensor([[4, 4, 1, 1], [4, 4, 4, 1]])]
    pairs.append(torch.tensor([[0, 0], [0, 0]]))
    value, resampled = mean_iou_resamples([Overlap.of(*pair) for pair in pairs])
    together = Overlap.of(torch.cat([truth for truth, _ in pairs]), torch.cat([guess for _, guess in pairs]))
    assert value == pytest.approx(together.mean_iou())
    assert resampled.min() < value < resampled.max()
    assert torch.isfinite(resampled).all(), "a class may be absent from a resample"


def test_colours_are_segmented(comparison):
    found = evaluate_segmentation(comparison, masked(HALVES), masked(CHECKED), neighbours=(1, 3), batch_size=2)
    metrics = {f"{metric}_k{k}" for metric in ("accuracy", "image_miou", "miou") for k in (1, 3)}
    for method in ("raw", "soap"):
        assert found.summary["means"][method] == pytest.approx(dict.fromkeys(metrics, 1.0))
    assert found.summary["differences"]["soap"].keys() == metrics
    assert set(found.summary["differences"]["soap"].values()) == {(0, 0, 0)}
    assert [row["image"] for row in found.rows] == ["row 0", "row 1", "row 2"]
    counts = found.summary["counts"]
    assert (counts["training_patches"], counts["classes"], counts["test_images"]) == (64, 2, 3)


def test_classes_of_large_masks_are_picked_and_not_blended(comparison):
    def enlarged(row):
        return {name: row[name].resize((64, 64), Image.Resampling.NEAREST) for name in ("image", "mask")}

    found = evaluate_segmentation(comparison, masked(HALVES), masked(CHECKED.map(enlarged)), neighbours=(1,))
    assert found.summary["means"]["raw"] == {"accuracy_k1": 1, "image_miou_k1": 1, "miou_k1": 1}


def test_ignored_pixels_count_nowhere(comparison):
    train = pictures([GREEN] * 8 + [IGNORED] * 8, [RED] * 8 + [IGNORED] * 8)
    test = pictures([GREEN] * 8 + [IGNORED] * 8, [IGNORED] * 16, [RED] * 16)
    found = evaluate_segmentation(comparison, masked(train), masked(test), neighbours=(1,))
    assert found.summary["means"]["raw"]["miou_k1"] == 1
    counts = found.summary["counts"]
    assert (counts["training_patches"], counts["test_images"], counts["unlabelled_test_images"]) == (16, 2, 1)
    counted = evaluate_segmentation(comparison, masked(train), masked(test), neighbours=(1,), ignore_label=-1)
    assert (counted.summary["counts"]["classes"], counted.summary["counts"]["test_images"]) == (3, 3)


def test_wrong_classes_show_in_every_measure(comparison):
    turned = CHECKED.map(lambda row: {"mask": row["mask"].point(lambda value: GREEN + RED - value)})
    found = evaluate_segmentation(comparison, masked(HALVES), masked(turned), neighbours=(1,))
    assert found.summary["means"]["raw"] == {"accuracy_k1": 0, "image_miou_k1": 0, "miou_k1": 0}


def test_a_class_without_training_patches_is_missed(comparison):
    found = evaluate_segmentation(
        comparison, masked(HALVES), masked(pictures([9] * 4 + [RED] * 12, [RED] * 16)), neighbours=(1,)
    )
    assert found.rows[0]["raw_accuracy_k1"] <= 0.75
    assert found.rows[1]["raw_accuracy_k1"] == 1


@pytest.mark.parametrize("mode", ["L", "P", "I", "I;16", "1"])
def test_masks_hold_numbers_in_any_mode_of_one_channel(mode, comparison):
    table = {GREEN: 0, RED: 1} if mode == "1" else {GREEN: GREEN, RED: 400 if mode.startswith("I") else RED}

    def changed(row):
        image, mask = row["image"], torch.zeros(32, 32, dtype=torch.int32)
        for old, new in table.items():
            mask[torch.from_numpy(np.array(row["mask"])) == old] = new
        if mode == "I":
            return image, Image.fromarray(mask.numpy())
        if mode == "I;16":
            return image, Image.fromarray(mask.to(torch.uint16).numpy())
        if mode == "1":
            return image, Image.fromarray(mask.bool().numpy())
        made = Image.fromarray(mask.to(torch.uint8).numpy())
        if mode == "P":
            made.putpalette([5, 6, 7] * 256)
        return image, made

    both = [changed(row) for row in HALVES]
    assert both[0][1].mode == ("P" if mode == "P" else mode)
    dataset = Dataset.from_dict({"image": [image for image, _ in both], "mask": [mask for _, mask in both]})
    found = evaluate_segmentation(comparison, masked(dataset), masked(dataset), neighbours=(1,))
    assert found.summary["means"]["raw"]["miou_k1"] == 1
    assert found.summary["counts"]["classes"] == 2


def test_masks_without_numbers_of_classes_are_refused(comparison):
    coloured = HALVES.map(lambda row: {"mask": row["mask"].convert("RGB")})
    with pytest.raises(DataError, match=r"The mask of row 0 is of mode RGB; give masks of one channel"):
        evaluate_segmentation(comparison, masked(coloured), masked(CHECKED))
    binary = HALVES.map(lambda row: {"mask": row["mask"].point(lambda value: 255 if value == RED else 0)})
    with pytest.raises(DataError, match=r"are of 1 class, 255 left out, but k-NN needs 2"):
        evaluate_segmentation(comparison, masked(binary), masked(CHECKED))
    assert evaluate_segmentation(comparison, masked(binary), masked(binary), ignore_label=-1, neighbours=(1,))
    with pytest.raises(DataError, match="no masks"):
        evaluate_segmentation(comparison, Examples(HALVES), masked(CHECKED))
    unlabelled = pictures([IGNORED] * 16, [GREEN] * 16)
    with pytest.raises(DataError, match="at least 2 test images with labelled pixels, but found 1"):
        evaluate_segmentation(comparison, masked(HALVES), masked(unlabelled))
    with pytest.raises(SOAPError, match="k must be"):
        evaluate_segmentation(comparison, masked(HALVES), masked(CHECKED), neighbours=(0,))
    with pytest.raises(DataError, match="100 neighbours needs as many vectors, but there are 64"):
        evaluate_segmentation(comparison, masked(HALVES), masked(CHECKED), neighbours=(100,))


def test_clips_are_refused():
    comparison = Comparison.of(SOAPModelWrapper.from_backbone(TINY_BACKBONES["videomae"].build(), None))
    with pytest.raises(LayoutError, match="in rows and columns, not on a grid of 3 axes"):
        evaluate_segmentation(comparison, masked(HALVES), masked(CHECKED))


def test_no_batch_size_changes_the_result(comparison):
    rows = [
        evaluate_segmentation(comparison, masked(HALVES), masked(CHECKED), neighbours=(3,), batch_size=size).rows
        for size in (1, 2, 32)
    ]
    assert rows[0] == rows[1] == rows[2]
