"""Scores tell invariant components from coin flips; weights remove the highest-scoring ones and nothing else."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from soap_hf import semantic_invariance, suppression_weights
from soap_hf.runtime.errors import SOAPError

GRIDS = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
SEEDS = st.integers(0, 2**32 - 1)
properties = settings(max_examples=30, deadline=None, derandomize=True)


def shares(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Random shares of images in [0, 1], exact zeros and ones among them."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, generator=generator, dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1)


@properties
@given(SEEDS, GRIDS, st.floats(1, 8) | st.just(math.inf), st.floats(1, 4))
def test_scores_lie_between_zero_and_one(seed, grid, alpha, gamma):
    p, q = shares(seed, (2, *grid, 5))
    scores = semantic_invariance(p, q, alpha=alpha, gamma=gamma)
    assert scores.shape == (5,)
    assert scores.min() >= 0
    assert scores.max() <= 1 + 1e-12


@properties
@given(SEEDS, GRIDS)
def test_scores_do_not_depend_on_the_order_of_the_sets_nor_on_the_sign_of_a_component(seed, grid):
    p, q = shares(seed, (2, *grid, 5))
    torch.testing.assert_close(semantic_invariance(q, p), semantic_invariance(p, q))
    torch.testing.assert_close(semantic_invariance(1 - p, 1 - q), semantic_invariance(p, q))


@properties
@given(SEEDS)
def test_score_is_twice_the_agreement_over_the_norms_and_averages_over_positions(seed):
    p, q = shares(seed, (2, 3, 1))
    expected = [
        2
        * (a * b + (1 - a) * (1 - b)) ** 1.5
        / (sum(x**3 for x in (a, 1 - a)) ** (1 / 3) + sum(x**3 for x in (b, 1 - b)) ** (1 / 3))
        for a, b in zip(p.flatten().tolist(), q.flatten().tolist(), strict=True)
    ]
    by_position = [semantic_invariance(a, b, alpha=3, gamma=1.5) for a, b in zip(p.split(1), q.split(1), strict=True)]
    assert torch.cat(by_position).tolist() == pytest.approx(expected)
    assert semantic_invariance(p, q, alpha=3, gamma=1.5).tolist() == pytest.approx([sum(expected) / 3])


def test_always_the_same_answer_scores_one():
    p = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    assert semantic_invariance(p, p).tolist() == [1, 1]


def test_opposite_answers_score_zero():
    p = torch.tensor([[0.0], [1.0]])
    assert semantic_invariance(p, 1 - p).tolist() == [0]


def test_coin_flips_score_the_square_root_of_a_half():
    p = torch.full((4, 4, 3), 0.5)
    assert semantic_invariance(p, p).tolist() == pytest.approx([math.sqrt(0.5)] * 3)


@pytest.mark.parametrize("options", [{"alpha": 0.9}, {"gamma": 0.0}, {"gamma": 0.9}, {"alpha": float("nan")}])
def test_exponents_out_of_range_are_refused(options):
    p = torch.full((2, 2), 0.5)
    with pytest.raises(SOAPError, match="alpha and gamma must be at least 1"):
        semantic_invariance(p, p, **options)


def test_different_grids_are_refused():
    with pytest.raises(SOAPError, match="share one grid"):
        semantic_invariance(torch.rand(2, 3), torch.rand(1, 3))


SCORES = torch.tensor([0.71, 0.96, 0.60, 0.84, 0.75], dtype=torch.float64)


@properties
@given(SEEDS, st.floats(-2, 8), st.floats(0.01, 2))
def test_weights_follow_the_scores_whatever_their_order(seed, mu, tau):
    scores = shares(seed, (6,))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    weights = suppression_weights(scores, mu=mu, tau=tau)
    assert torch.equal(suppression_weights(scores[order], mu=mu, tau=tau).sort().values, weights.sort().values)
    assert weights.min() >= 0
    assert (weights <= scores).all()
    by_score = weights[scores.argsort(descending=True, stable=True)]
    assert (by_score.diff() <= 0).all()


@pytest.mark.parametrize("tau", [0.1, 0.2, 1.0])
def test_weight_falls_with_the_rank_as_a_sigmoid_of_width_tau(tau):
    order = SCORES.argsort(descending=True)
    window = (suppression_weights(SCORES, mu=2.5, tau=tau) / SCORES)[order]
    torch.testing.assert_close(window[2], torch.tensor(0.5, dtype=torch.float64))  # the cut: rank mu - 0.5
    torch.testing.assert_close(torch.logit(window).diff(), torch.full((4,), -1 / tau, dtype=torch.float64))


@pytest.mark.parametrize("mu", range(1, 6))
def test_a_whole_mu_removes_as_many_components_up_to_one_minus_their_score(mu):
    weights, top = suppression_weights(SCORES, mu=mu), SCORES.topk(mu).indices
    torch.testing.assert_close(weights[top], SCORES[top], rtol=1e-4, atol=0)
    weights[top] = 0
    assert weights.max() < 1e-4


@pytest.mark.parametrize(("threshold", "above"), [(0.75, 2), (0.7, 4), (0.5, 5), (0.95, 1), (0.99, 0)])
def test_automatic_mu_counts_the_scores_above_the_threshold(threshold, above):
    expected = suppression_weights(SCORES, mu=above)
    assert torch.equal(suppression_weights(SCORES, mu="auto", threshold=threshold), expected)


def test_the_threshold_is_three_quarters_unless_given():
    assert torch.equal(suppression_weights(SCORES), suppression_weights(SCORES, threshold=0.75))


def test_nothing_is_removed_if_no_score_exceeds_the_threshold():
    assert not suppression_weights(SCORES.clamp(max=0.75)).any()


@pytest.mark.parametrize("mu", [0, -1, -2.5])
def test_nothing_is_removed_for_mu_up_to_zero(mu):
    assert torch.equal(suppression_weights(SCORES, mu=mu), torch.zeros_like(SCORES))


def test_among_equal_scores_the_first_is_removed_first():
    scores = torch.full((100,), 0.8)
    assert torch.equal(suppression_weights(scores, mu=3).topk(3).indices.sort().values, torch.arange(3))
    assert (suppression_weights(scores, mu=50, tau=10).diff() < 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept_and_scores_stay_as_they_were(dtype):
    scores = SCORES.to(dtype)
    assert suppression_weights(scores, mu=2).dtype == dtype
    assert torch.equal(scores, SCORES.to(dtype))


@pytest.mark.parametrize("tau", [0.0, -0.1, math.nan])
def test_a_window_without_width_is_refused(tau):
    with pytest.raises(SOAPError, match="tau must be above 0"):
        suppression_weights(SCORES, tau=tau)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(value):
    with pytest.raises(SOAPError, match="finite"):
        suppression_weights(torch.tensor([0.9, value]))


def test_a_mu_in_words_is_refused():
    with pytest.raises(SOAPError, match='"auto"'):
        suppression_weights(SCORES, mu="all")
