"""Streaming sums do not depend on how the tokens are cut, their dtype or a large mean; bad tokens add nothing."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from soap_hf.fitting import processes
from soap_hf.runtime.errors import NonFiniteTokensError, SOAPError
from soap_hf.statistics import token_statistics
from soap_hf.statistics.token_statistics import JACKKNIFE_GROUPS, PrincipalComponents, ResponseCounts, TokenMoments

GRID, DIM, IMAGES = (3, 2), 5, 23
SCALES = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.1])

cuts = st.lists(st.integers(0, IMAGES), max_size=6).map(sorted)
properties = settings(max_examples=30, deadline=None, derandomize=True)


def random_tokens(images: int = IMAGES, seed: int = 0) -> Tensor:
    """Tokens of unequal variances, mixed, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator)).Q
    return (torch.randn(images, *GRID, DIM, generator=generator) * SCALES) @ mixing + 3


def moments(*chunks: Tensor) -> TokenMoments:
    total = TokenMoments(DIM)
    for chunk in chunks:
        total.update(chunk)
    return total


def counts(principal: PrincipalComponents, *chunks: Tensor) -> ResponseCounts:
    total = ResponseCounts(principal, GRID)
    for chunk in chunks:
        total.update(chunk)
    return total


def assert_same_moments(one: TokenMoments, other: TokenMoments, rtol: float = 1e-9) -> None:
    assert one.count == other.count
    torch.testing.assert_close(one.mean, other.mean, rtol=rtol, atol=0)
    scale = float(one.covariance().abs().max())
    torch.testing.assert_close(one.covariance(), other.covariance(), rtol=0, atol=rtol * scale)


def test_moments_are_those_of_the_whole_batch():
    tokens = random_tokens()
    rows = tokens.double().flatten(0, -2)
    whole = moments(tokens)
    assert whole.count == len(rows)
    torch.testing.assert_close(whole.mean, rows.mean(dim=0))
    torch.testing.assert_close(whole.covariance(), torch.cov(rows.T))


@properties
@given(cuts)
def test_any_chunking_gives_the_same_moments_and_counts(cut):
    tokens = random_tokens()
    chunks = tokens.tensor_split(cut)
    chunked = moments(*chunks)
    assert_same_moments(chunked, moments(tokens))
    principal = moments(tokens).principal_components()
    whole, streamed = counts(principal, tokens), counts(principal, *chunks)
    assert torch.equal(streamed.positive, whole.positive)
    assert torch.equal(streamed.images, whole.images)


class Together:
    """Adds up the tensors of threads that stand for processes, each of which calls it as often as the others."""

    def __init__(self, number: int):
        self.num_processes = number
        self._barrier, self._lock, self._sums = threading.Barrier(number), threading.Lock(), {}
        self._calls = threading.local()

    def __call__(self, tensor: Tensor) -> Tensor:
        call = self._calls.number = getattr(self._calls, "number", -1) + 1
        with self._lock:
            self._sums[call] = self._sums.get(call, 0) + tensor
        self._barrier.wait(timeout=60)
        return self._sums[call]


def merged(merge, parts, monkeypatch):
    """What each process gets that merges its part with those of the others."""
    together = Together(len(parts))
    with monkeypatch.context() as patch:
        patch.setattr(processes, "sum_over_processes", together)
        patch.setattr(processes, "PartialState", lambda: together)
        with ThreadPoolExecutor(len(parts)) as pool:
            return list(pool.map(merge, parts))


@pytest.mark.parametrize("cut", [[], [5], [0, 0, 23], [1, 2, 3, 20], [7, 7, 15]])
def test_the_accumulators_of_processes_add_up(cut, monkeypatch):
    tokens = random_tokens()
    principal = moments(tokens).principal_components()
    chunks = tokens.tensor_split(cut)
    parts = [moments(chunk) for chunk in chunks]
    for total in merged(processes.merged_moments, parts, monkeypatch):
        assert_same_moments(total, moments(tokens))
    assert [part.count for part in parts] == [chunk[..., 0].numel() for chunk in chunks], "the parts stay as they were"
    for total in merged(processes.merged_counts, [counts(principal, chunk) for chunk in chunks], monkeypatch):
        assert total.num_images == IMAGES
        assert torch.equal(total.response(), counts(principal, tokens).response())


def test_rows_are_worked_off_in_blocks(monkeypatch):
    tokens = random_tokens()
    principal = moments(tokens).principal_components()
    whole = moments(tokens), counts(principal, tokens)
    monkeypatch.setattr(token_statistics, "ROW_BLOCK", 7)
    assert_same_moments(moments(tokens), whole[0])
    assert torch.equal(counts(principal, tokens).positive, whole[1].positive)


def test_empty_accumulators_give_no_result():
    with pytest.raises(SOAPError, match="at least 2 patch tokens"):
        TokenMoments(DIM).covariance()
    principal = moments(random_tokens()).principal_components()
    with pytest.raises(SOAPError, match="at least one image"):
        ResponseCounts(principal, GRID).response()


def test_one_token_has_no_covariance():
    with pytest.raises(SOAPError, match="only 1 were seen"):
        moments(torch.ones(1, DIM)).covariance()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tokens_count_as_their_float32_copies(dtype):
    tokens = random_tokens().to(dtype)
    half, single = moments(tokens), moments(tokens.float())
    assert torch.equal(half.mean, single.mean)
    assert torch.equal(half.scatter, single.scatter)
    principal = single.principal_components()
    assert torch.equal(counts(principal, tokens).positive, counts(principal, tokens.float()).positive)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_tokens_that_are_not_finite_are_refused_and_add_nothing(value):
    tokens = random_tokens()
    broken = tokens.clone()
    broken[-1, -1, -1, -1] = value
    seen, answers = moments(tokens), counts(moments(tokens).principal_components(), tokens)
    for accumulator in (seen, answers):
        with pytest.raises(NonFiniteTokensError, match="NaN or Inf"):
            accumulator.update(broken)
    assert torch.equal(seen.scatter, moments(tokens).scatter)
    assert seen.count == moments(tokens).count
    assert torch.equal(answers.positive, counts(answers.principal, tokens).positive)
    assert answers.num_images == IMAGES


def test_covariance_stays_accurate_far_from_the_origin():
    tokens = random_tokens().double()
    far = moments(*(tokens + 1e8).split(4))
    torch.testing.assert_close(far.covariance(), moments(tokens).covariance(), rtol=1e-6, atol=1e-6)


def test_principal_components_diagonalise_the_covariance():
    seen = moments(random_tokens())
    mean, eigenvalues, components, resolved = seen.principal_components()
    torch.testing.assert_close(mean, seen.mean)
    torch.testing.assert_close(components.T @ components, torch.eye(DIM, dtype=torch.float64))
    torch.testing.assert_close(components * eigenvalues @ components.T, seen.covariance())
    assert (eigenvalues.diff() <= 0).all()
    assert resolved.all()


def test_sign_of_a_component_is_fixed_by_its_largest_entry():
    components = moments(random_tokens()).principal_components().components
    largest = components.abs().argmax(dim=0)
    assert (components[largest, range(DIM)] > 0).all()


def test_directions_of_mere_round_off_are_told_apart_and_never_answer():
    flat = torch.randn(IMAGES, *GRID, 2) @ torch.randn(2, DIM)  # float32 rounding leaves a little variance elsewhere
    principal = moments(flat).principal_components()
    assert principal.resolved.tolist() == [True, True, False, False, False]
    response = counts(principal, flat).response()
    assert response[..., :2].any()
    assert not response[..., 2:].any()


def test_directions_of_little_variance_answer():
    tokens = torch.randn(IMAGES, *GRID, DIM) * torch.tensor([1.0, 1.0, 1e-2, 1e-4, 1e-6])
    principal = moments(tokens).principal_components()
    assert principal.resolved.all()
    assert (counts(principal, tokens).response().mean(dim=(0, 1)) > 0.3).all()


def test_equal_tokens_are_refused():
    with pytest.raises(SOAPError, match="equal"):
        moments(torch.full((IMAGES, *GRID, DIM), 0.1)).principal_components()


def test_response_is_the_share_of_images_beyond_the_mean_at_each_position():
    tokens = random_tokens().double()
    principal = moments(tokens).principal_components()
    expected = ((tokens - principal.mean) @ principal.components > 0).double().mean(dim=0)
    torch.testing.assert_close(counts(principal, tokens).response(), expected)


@pytest.mark.parametrize("shape", [(4, 2, 3, DIM), (4, 6, DIM), (4, DIM), (4, 3, 3, DIM)])
def test_tokens_on_another_grid_are_refused(shape):
    principal = moments(random_tokens()).principal_components()
    with pytest.raises(SOAPError, match=r"share one grid: expected \(3, 2\)"):
        counts(principal, torch.randn(shape))


@pytest.mark.parametrize("images", [2, 7, JACKKNIFE_GROUPS, IMAGES])
def test_each_group_left_out_holds_its_share_of_the_images(images):
    tokens = random_tokens(images)
    principal = moments(tokens).principal_components()
    left_out = list(counts(principal, *tokens.split(4)).leave_one_group_out())
    assert len(left_out) == min(images, JACKKNIFE_GROUPS)
    for group, response in enumerate(left_out):
        others = torch.arange(images) % JACKKNIFE_GROUPS != group
        torch.testing.assert_close(response, counts(principal, tokens[others]).response())


def test_a_single_image_leaves_no_group_out():
    tokens = random_tokens()
    principal = moments(tokens).principal_components()
    assert list(counts(principal, tokens[:1]).leave_one_group_out()) == []


def test_equal_float64_tokens_are_refused_too():
    with pytest.raises(SOAPError, match="All patch tokens are equal"):
        TokenMoments(3).update(torch.full((7, 3), 0.1, dtype=torch.float64)).principal_components()


def test_saved_sums_go_on_as_if_never_interrupted():
    first, second = random_tokens(seed=1), random_tokens(seed=2)
    principal = moments(first).principal_components()
    begun, answers = moments(first), counts(principal, first)
    saved = {name: tensor.clone() for name, tensor in {**begun.tensors(), **answers.tensors()}.items()}
    resumed = TokenMoments(DIM).load(saved).update(second)
    assert torch.equal(resumed.scatter, begun.update(second).scatter)
    assert resumed.count == begun.count
    answered = ResponseCounts(principal, GRID).load(saved).update(second)
    assert torch.equal(answered.positive, answers.update(second).positive)
    assert torch.equal(answered.images, answers.images)


@pytest.mark.parametrize("shift", [0, 30, 1000])
def test_float32_products_err_by_their_rounding_alone(shift):
    """Below 1e-6 of the largest entry, far from the origin too."""
    tokens = random_tokens(400) + shift
    exact, principal = moments(tokens), moments(tokens).principal_components()
    torch.set_float32_matmul_precision("medium")
    try:
        single = TokenMoments(DIM, products=torch.float32).update(tokens)
        answers = ResponseCounts(principal, GRID, torch.float32).update(tokens)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    scale = float(exact.covariance().abs().max())
    torch.testing.assert_close(single.covariance(), exact.covariance(), rtol=0, atol=1e-6 * scale)
    torch.testing.assert_close(single.mean, exact.mean, rtol=1e-7, atol=1e-7)
    flipped = (answers.positive - counts(principal, tokens).positive).abs().sum()
    assert flipped <= 2
