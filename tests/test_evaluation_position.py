"""The share of variance that position explains is 1 for tokens that tell nothing else, and near 0 without position."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from soap_hf import SOAPProjection
from soap_hf.errors import SOAPError
from soap_hf.evaluation.position import position_variance_share

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
