"""Matching: pure position is stuck, pure content is right; the answer depends on images, rule and seed alone."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModel

from soap_hf import Comparison, Examples, SOAPModelWrapper, evaluate_matching
from soap_hf.data.data_sets import open_dataset
from soap_hf.evaluation.matching import matching_row, nearest
from soap_hf.evaluation.views import ViewRule, counts, draw_views, patch_centres, true_places
from soap_hf.runtime.errors import DataError
from tests.conftest import EXAMPLES, random_projection

GRID = (8, 6)
SEEDS = st.integers(0, 2**32 - 1)
properties = settings(max_examples=25, deadline=None, derandomize=True)


def drawn(seed: int, rule: ViewRule | None = None):
    """A pair of views of an image whose red and green tell column and row."""
    return draw_views(place_image((300, 200)), rule or ViewRule(), (96, 72), GRID, np.random.default_rng(seed))


def place_image(shape: tuple[int, int]) -> Image.Image:
    """Red grows from left to right, green from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, shape[0]), np.linspace(0, 255, shape[1]))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], axis=-1).astype(np.uint8))


@properties
@given(SEEDS, st.booleans())
def test_the_homography_says_where_what_the_first_view_shows_lies_in_the_second(seed, flip):
    pair = drawn(seed, ViewRule(jitter=0, flip=flip))
    places, inside = true_places(pair.homography, GRID)
    cell = torch.tensor([96 / GRID[0], 72 / GRID[1]])
    for view, points in ((0, patch_centres(GRID)[inside]), (1, places[inside])):
        y, x = (points * cell).floor().long().clamp(min=0).T
        colours = pair.views[view][:2, y.clamp(max=95), x.clamp(max=71)].double()
        if view == 0:
            seen = colours
    assert (seen - colours).abs().max() <= 6  # of 255: one pixel of the view and the interpolation


@properties
@given(SEEDS)
def test_pairs_count_that_share_enough_and_have_moved(seed):
    pair = drawn(seed)
    places, inside = true_places(pair.homography, GRID)
    moves = (places - patch_centres(GRID)).abs().amax(dim=1)[inside]
    assert inside.double().mean() >= 0.3
    assert moves.mean() >= 1.5


def test_views_that_are_the_same_do_not_count():
    assert not counts(torch.eye(3, dtype=torch.float64), ViewRule(), GRID)


@properties
@given(SEEDS, st.booleans())
def test_pure_position_is_stuck_and_right_by_chance_alone(seed, flip):
    pair, own = drawn(seed, ViewRule(flip=flip)), torch.eye(math.prod(GRID))
    row = matching_row({"raw": (own, own)}, pair.homography, GRID)
    assert row["raw_stuck"] == 1
    places, inside = true_places(pair.homography, GRID)
    near = (places - patch_centres(GRID)).abs().amax(dim=1)[inside] <= 1
    assert row["raw_right_1"] == pytest.approx(float(near.double().mean()))


@properties
@given(SEEDS, st.booleans())
def test_pure_content_is_right_and_never_stuck(seed, flip):
    """Tokens are waves of the place in the photograph, so that the nearest token is the nearest place."""
    pair = drawn(seed, ViewRule(flip=flip))
    places, _ = true_places(pair.homography, GRID)
    frequencies = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 8

    def waves(points):
        return torch.cat([(points @ frequencies).cos(), (points @ frequencies).sin()], dim=1)

    row = matching_row({"raw": (waves(places), waves(patch_centres(GRID)))}, pair.homography, GRID)
    assert (row["raw_right_1"], row["raw_stuck"]) == (1, 0)


def test_the_nearest_is_by_cosine():
    tokens, others = torch.randn(7, 5), torch.randn(9, 5)
    cosines = torch.nn.functional.cosine_similarity(tokens[:, None], others[None], dim=-1)
    assert nearest(3 * tokens, others * torch.rand(9, 1).add(0.1)).tolist() == cosines.argmax(dim=1).tolist()


@pytest.fixture
def model(mae_folder) -> SOAPModelWrapper:
    return SOAPModelWrapper.from_backbone(
        AutoModel.from_pretrained(mae_folder, dtype="float32"), random_projection(192)
    )


def test_batches_order_of_methods_and_other_images_change_nothing(model, photos):
    comparison = Comparison.of(model, ["soap", "zero-image"])
    turned = Comparison.of(model, ["zero-image", "soap"])
    images = open_dataset(photos)
    one = evaluate_matching(comparison, Examples(images, num_images=12), batch_size=4, progress=False)
    other = evaluate_matching(turned, Examples(images, num_images=12), batch_size=24, progress=False)
    more = evaluate_matching(comparison, Examples(images, num_images=30), progress=False)
    known = {row["image"]: row for row in more.rows}
    for row, again in zip(one.rows, other.rows, strict=True):
        assert row == again == known[row["image"]]


def test_several_workers_draw_the_same_views(model, photos, monkeypatch):
    comparison, images = Comparison.of(model), open_dataset(photos)
    one = evaluate_matching(comparison, Examples(images, num_images=10), progress=False)
    monkeypatch.setattr("soap_hf.data.image_sample.default_workers", lambda images: 2)
    other = evaluate_matching(comparison, Examples(images, num_images=10), progress=False)
    assert one.rows == other.rows


def test_another_seed_draws_other_views(model, photos):
    comparison, images = Comparison.of(model), Examples(open_dataset(photos), num_images=8)
    first, second = (evaluate_matching(comparison, images, seed=seed, progress=False).rows for seed in (0, 1))
    assert first != second


def test_methods_are_measured_on_the_tokens_of_one_forward_pass(model, photos, monkeypatch):
    calls = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    comparison = Comparison.of(model, ["soap", "zero-image"])
    calls.clear()
    evaluate_matching(comparison, Examples(open_dataset(photos), num_images=8), batch_size=4, progress=False)
    assert len(calls) == 1 + 4, "one to learn the grid, one for each two photographs"


def test_photographs_too_small_are_named_skipped_and_counted(model, photos, caplog):
    files = sorted(photos.glob("*.jpg"))[:9]
    images = [Image.open(path).convert("RGB") for path in files] + [Image.new("RGB", (20, 30))]
    found = evaluate_matching(Comparison.of(model), Dataset.from_dict({"image": images}), progress=False)
    assert found.summary["counts"] == {"images": 9, "skipped_images": 1, "bad_images": 0}
    assert "1 of 10 photographs give no two views: row 9: of 20 x 30 pixels it is too small" in caplog.text


def test_few_photographs_are_told_with_their_interval(model, photos, caplog):
    evaluate_matching(Comparison.of(model), Examples(open_dataset(photos), num_images=5), progress=False)
    assert "Only 5 photographs give two views, which says little (soap" in caplog.text


def test_no_usable_photograph_is_refused(model):
    images = Dataset.from_dict({"image": [Image.new("RGB", (16, 16)) for _ in range(3)]})
    with pytest.raises(DataError, match="No photograph gives two views"):
        evaluate_matching(Comparison.of(model), images, progress=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"smallest_crop": 0}, "Crops must go from above 0"),
        ({"smallest_crop": 0.9, "largest_crop": 0.5}, "not from 0.9 to 0.5"),
        ({"jitter": 1.5}, "jitter must lie between 0 and 1"),
        ({"least_overlap": -1}, "least_overlap must lie"),
        ({"least_move": float("nan")}, "least_move must lie"),
    ],
)
def test_an_impossible_rule_is_refused(values, message):
    with pytest.raises(DataError, match=message):
        ViewRule(**values)


def test_the_command_measures_and_writes(run, tmp_path):
    head, photos = EXAMPLES / "soap-vit-mae-tiny", EXAMPLES / "photos" / "heldout"
    options = ("--num-images", 16, "--flip", "--output", "out", "--quiet")
    status, out, err = run("evaluate", "matching", head, photos, *options)
    assert status == 0, err
    assert "right_1" in out
    assert len(Path(tmp_path, "out", "matching.csv").read_text(encoding="utf-8").splitlines()) == 17


@pytest.mark.parametrize("sources", [(), ("photos", "--spair", "folder")])
def test_the_command_takes_one_source(refused, sources):
    assert "one source" in refused("evaluate", "matching", EXAMPLES / "soap-vit-mae-tiny", *sources)
