"""What position explains is 1 for tokens that tell nothing else, and near 0 for tokens without position."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import AutoModel

from soap_hf import SOAPModelWrapper, SOAPProjection
from soap_hf.data.data_sets import open_dataset
from soap_hf.evaluation.comparison import Comparison
from soap_hf.evaluation.examples import Examples
from soap_hf.evaluation.methods import head_preprocessor
from soap_hf.evaluation.position import evaluate_position, position_probe, position_shares, position_variance_share
from soap_hf.runtime.errors import SOAPError
from tests.conftest import random_projection

GRIDS = st.lists(st.integers(1, 5), min_size=1, max_size=2).map(tuple)
SEEDS = st.integers(0, 2**32 - 1)
properties = settings(max_examples=25, deadline=None, derandomize=True)


def random_tokens(seed: int, grid: tuple[int, ...], images: int = 6) -> Tensor:
    """Tokens with a positional part, in float64."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.randn(1, *grid, 4, generator=generator, dtype=torch.float64)
    return position + torch.randn(images, *grid, 4, generator=generator, dtype=torch.float64)


@properties
@given(SEEDS, GRIDS)
def test_share_lies_between_zero_and_one(seed, grid):
    assert 0 <= position_variance_share(random_tokens(seed, grid)) <= 1


@properties
@given(SEEDS, GRIDS)
def test_share_does_not_depend_on_units_origin_or_rotation(seed, grid):
    tokens = random_tokens(seed, grid)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    moved = 7 * tokens @ rotation + torch.tensor([1.0, -20.0, 3.0, 100.0])
    assert position_variance_share(moved) == pytest.approx(position_variance_share(tokens))


@properties
@given(SEEDS, GRIDS)
def test_shares_of_position_and_of_the_rest_sum_to_one(seed, grid):
    tokens = random_tokens(seed, grid)
    rest = tokens - tokens.mean(dim=0)
    share = position_variance_share(tokens)
    by_rest = rest.square().sum() / (tokens - tokens.flatten(0, -2).mean(dim=0)).square().sum()
    assert share + float(by_rest) == pytest.approx(1)
    assert position_variance_share(rest, tokens) == pytest.approx(0)


def test_tokens_alike_on_all_images_are_explained():
    tokens = torch.randn(1, 3, 3, 5).expand(8, -1, -1, -1)
    assert position_variance_share(tokens) == pytest.approx(1)


@pytest.mark.parametrize("images", [10, 100])
def test_tokens_without_position_give_one_over_the_number_of_images(images):
    assert position_variance_share(torch.randn(images, 8, 8, 64)) == pytest.approx(1 / images, rel=0.1)


def test_share_is_that_of_the_planted_variance():
    position = 2 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])[..., None]
    assert position_variance_share(torch.randn(4000, 2, 2, 1) + position) == pytest.approx(4 / 5, abs=0.02)


def test_clean_tokens_are_measured_against_the_raw_total():
    raw = torch.randn(6, 3, 3, 5)
    assert position_variance_share(raw, raw) == position_variance_share(raw)
    assert position_variance_share(raw / 2, raw) == pytest.approx(position_variance_share(raw) / 4)


def test_a_projection_removes_the_share_of_its_direction():
    raw = torch.randn(200, 2, 2, 4)
    raw[..., 0] += torch.tensor([[3.0, -3.0], [3.0, -3.0]])
    clean = SOAPProjection(torch.eye(4)[:, :1], torch.ones(1))(raw)
    assert position_variance_share(raw) > 0.6
    assert position_variance_share(clean, raw) < 0.01


def test_half_precision_tokens_are_measured_in_float64():
    tokens = (1000 + torch.randn(50, 4, 4, 8)).half()
    assert position_variance_share(tokens) == pytest.approx(position_variance_share(tokens.double()), rel=1e-12)


def test_tokens_of_other_shapes_are_refused():
    with pytest.raises(SOAPError, match="one shape"):
        position_variance_share(torch.randn(4, 2, 2, 3), torch.randn(4, 2, 2, 5))


def test_tokens_that_do_not_vary_are_refused():
    with pytest.raises(SOAPError, match="do not vary"):
        position_variance_share(torch.ones(4, 2, 2, 3))


def leave_one_out(tokens: Tensor, raw: Tensor) -> Tensor:
    """The pseudo-values of the jackknife, computed by leaving every image out."""
    images = len(tokens)
    whole = position_variance_share(tokens, raw)
    others = [torch.arange(images) != number for number in range(images)]
    return torch.tensor(
        [images * whole - (images - 1) * position_variance_share(tokens[one], raw[one]) for one in others]
    )


def test_what_images_contribute_has_the_spread_of_a_jackknife():
    raw = random_tokens(1, (4, 4), images=80)
    clean = SOAPProjection(torch.eye(4)[:, :1], torch.ones(1))(raw)
    for tokens in (raw, clean):
        shares = position_shares(tokens, raw)
        assert float(shares.mean()) == pytest.approx(position_variance_share(tokens, raw))
        jackknife = leave_one_out(tokens, raw)
        assert float(shares.std()) == pytest.approx(float(jackknife.std()), rel=0.05)
        assert torch.corrcoef(torch.stack([shares, jackknife.double()]))[0, 1] > 0.99


def places(images: int, rows: int = 4, columns: int = 5) -> Tensor:
    """Noise with the row along axis 0 and the column along axis 1."""
    tokens = torch.randn(images, rows, columns, 12, generator=torch.Generator().manual_seed(0))
    tokens[..., 0] += 6 * torch.arange(rows).view(-1, 1)
    tokens[..., 1] += 6 * torch.arange(columns)
    return tokens


def test_a_probe_tells_planted_rows_and_columns():
    tokens = places(60)
    assert position_probe(tokens, tokens).shape == (60, 2)
    assert position_probe(tokens, tokens).mean(dim=0).min() > 0.85
    without_rows = SOAPProjection(torch.eye(12)[:, :1], torch.ones(1))(tokens)
    row, column = position_probe(without_rows, tokens).mean(dim=0).tolist()
    assert row < 0.05
    assert column > 0.85


def test_a_probe_finds_nothing_in_noise():
    tokens = torch.randn(60, 4, 4, 12)
    assert position_probe(tokens, tokens).mean(dim=0).max() < 0.02


def test_every_image_is_held_out():
    """An image that a probe has not seen is told no better for having odd tokens of its own."""
    tokens = places(2)
    tokens[1] = torch.randn(tokens[1].shape)
    seen, unseen = position_probe(tokens, tokens).mean(dim=1).tolist()
    assert seen < 0.5, "fitted on the other image alone, which knows nothing"
    assert unseen < 0.5


def test_the_ridge_is_of_the_raw_tokens_so_that_what_is_scaled_down_counts_less():
    tokens = places(60)
    scaled = SOAPProjection(torch.eye(12)[:, :2], torch.full((2,), 0.95))(tokens)
    weak, strong = (position_probe(scaled, tokens, ridge=ridge).mean() for ridge in (1e-6, 1.0))
    assert weak > 0.3, "without a ridge a probe scales up again what is left"
    assert strong < 0.05
    in_other_units = position_probe(7 * scaled + 3, 7 * tokens + 3)
    torch.testing.assert_close(in_other_units, position_probe(scaled, tokens), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "ridge", "message"),
    [
        ((1, 4, 4, 3), 1.0, "2 images and a grid of 2 x 2"),
        ((5, 1, 4, 3), 1.0, "2 images and a grid of 2 x 2"),
        ((5, 16, 3), 1.0, "2 images and a grid of 2 x 2"),
        ((5, 4, 4, 3), 0.0, "ridge of a probe must be positive, not 0.0"),
        ((5, 4, 4, 3), float("nan"), "must be positive"),
    ],
)
def test_what_cannot_be_probed_is_refused(shape, ridge, message):
    with pytest.raises(SOAPError, match=message):
        position_probe(torch.randn(shape), torch.randn(shape), ridge=ridge)


def test_a_head_is_measured_on_the_tokens_of_its_backbone(mae_folder, photos):
    backbone = AutoModel.from_pretrained(mae_folder, dtype="float32")
    model = SOAPModelWrapper.from_backbone(backbone, random_projection(192))
    images = Examples(open_dataset(photos), num_images=12)
    found = evaluate_position(Comparison.of(model), images, batch_size=5)
    assert len(found.rows) == found.summary["counts"]["images"] == 12
    assert found.summary["counts"]["positions"] == 64
    preprocess = head_preprocessor(model)
    pixels = torch.stack([preprocess(Image.open(photos / row["image"])) for row in found.rows])
    with torch.no_grad():
        raw, clean = model.patch_tokens(pixels, raw=True), model.patch_tokens(pixels)
    means = found.summary["means"]
    assert means["raw"]["share"] == pytest.approx(position_variance_share(raw), rel=1e-4)
    assert means["soap"]["share"] == pytest.approx(position_variance_share(clean, raw), rel=1e-4)
    assert means["soap"]["row_r2"] == pytest.approx(float(position_probe(clean, raw).mean(dim=0)[0]), rel=1e-3)
    assert found.summary["differences"]["soap"]["share"].mean == pytest.approx(
        means["soap"]["share"] - means["raw"]["share"]
    )
