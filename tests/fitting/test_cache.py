"""Tokens are kept while they fit, the first of the sample, and in 16 bits they hardly change."""

import pytest
import torch
from torch import Tensor

from soap_hf import SOAPStatistics, fit_soap
from soap_hf.data.arguments import parse_bytes
from soap_hf.fitting.cache import TokenCache, plan_cache
from soap_hf.runtime.errors import DataError

SHAPE = (3, 2, 8)


def tokens_of(positions: list[int]) -> dict[int, Tensor]:
    """Tokens that tell their image's position."""
    return {
        layer: torch.stack([torch.full(SHAPE, position + layer / 8) for position in positions]) for layer in (-1, 2)
    }


def kept(cache: TokenCache, **options: int) -> list[int]:
    return [round(image[0, 0, 0].item()) for tokens in cache.batches(**options) for image in tokens[-1]]


@pytest.mark.parametrize("size", [1, 3, 4, 10])
def test_the_first_images_are_kept_whatever_the_batches(size):
    cache = TokenCache(2, 7)
    for batch in torch.arange(10).split(size):
        cache.add(tokens_of(batch.tolist()), batch.tolist())
    assert kept(cache) == list(range(7))
    assert kept(cache, num_images=3) == [0, 1, 2]
    cache.clear()
    assert kept(cache) == []


def test_tokens_stay_exact_while_all_images_fit_and_are_all_halved_once_not():
    tokens = {-1: torch.randn(4, *SHAPE)}
    cache = TokenCache(6, 12)
    cache.add(tokens, [0, 1, 2, 3])
    (same,) = cache.batches()
    assert torch.equal(same[-1], tokens[-1])
    cache.add(tokens, [4, 5, 6, 7])
    for halved in cache.batches():
        assert not torch.equal(halved[-1], tokens[-1])
        torch.testing.assert_close(halved[-1], tokens[-1], rtol=2**-10, atol=1e-6)


def test_large_values_do_not_overflow_and_16_bits_are_kept_as_they_are():
    large = {-1: torch.randn(2, *SHAPE) * 1e6}
    cache = TokenCache(0, 2)
    cache.add(large, [0, 1])
    torch.testing.assert_close(next(cache.batches())[-1], large[-1], rtol=2**-10, atol=1e-6 * 1e6)
    for dtype in (torch.float16, torch.bfloat16):
        cache = TokenCache(0, 2)
        cache.add({-1: large[-1].to(dtype)}, [0, 1])
        assert torch.equal(next(cache.batches())[-1], large[-1].to(dtype))


def test_a_cache_keeps_to_its_budget():
    tokens, budget = {-1: torch.randn(1, *SHAPE)}, 20_000
    cache, num_probes = plan_cache(tokens, budget, step_size=4)
    for position in range(500):
        cache.add(tokens, [position])
    held = sum(packed[-1].nbytes for _, packed in cache._batches)
    assert 0.9 * budget < held + num_probes * tokens[-1].nbytes <= budget


def test_a_budget_below_one_step_says_how_much_is_needed():
    tokens = {-1: torch.randn(1, 14, 14, 768)}
    with pytest.raises(DataError, match=r"of 5 MB cannot hold the tokens of 32 images.*give it (\d+)MB") as refused:
        plan_cache(tokens, 5_000_000, step_size=32)
    enough = str(refused.value).partition("give it ")[2].split()[0]
    assert plan_cache(tokens, parse_bytes(enough), step_size=32)[0].num_images >= 32


@pytest.mark.parametrize("size", ["much", "-3GB", -1, "GB"])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(DataError, match="is no size; give one as 2GB"):
        parse_bytes(size)


def test_each_image_passes_through_the_backbone_once(vit, images, processor):
    seen = []
    vit.register_forward_pre_hook(
        lambda module, inputs, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    model = fit_soap(vit, images, image_processor=processor, batch_size=8, check=0, progress=False)
    assert sum(seen[2:]) == 80 + 80, "after the probe of the layout and one image for the shapes"
    seen.clear()
    exact = fit_soap(vit, images, image_processor=processor, batch_size=8, exact=True, check=0, progress=False)
    assert sum(seen[2:]) == 80 + 80 + 80
    for name in ("scores", "eigenvalues", "real_response"):
        assert torch.equal(getattr(model.statistics, name), getattr(exact.statistics, name)), name


def test_a_small_cache_answers_by_the_first_images_and_counts_all_for_the_components(mae_folder, photos):
    def fit(**options) -> SOAPStatistics:
        return fit_soap(mae_folder, photos, check=0, progress=False, **options).statistics

    everything, small, other_batches = (
        fit(),
        fit(token_cache="1MB", batch_size=8),
        fit(token_cache="1MB", batch_size=7),
    )
    assert torch.allclose(small.eigenvalues, everything.eigenvalues, rtol=1e-4)
    assert 16 < small.num_real < 64
    assert small.num_real == small.num_synthetic == other_batches.num_real
    assert (small.scores - everything.scores)[:24].abs().max() < 5 * everything.standard_errors[:24].max()


def test_16_bits_move_the_leading_scores_by_less_than_a_thousandth(mae_folder, photos):
    whole = fit_soap(mae_folder, photos, check=0, progress=False).statistics
    halved = fit_soap(mae_folder, photos, token_cache="2.5MB", check=0, progress=False).statistics
    assert halved.num_real == 64
    assert not torch.equal(halved.real_response, whole.real_response)
    assert (halved.scores - whole.scores)[:24].abs().max() < 1e-3


def test_a_sample_that_will_not_fit_is_in_16_bits_from_the_first_batch(mae_folder, photos, monkeypatch):
    dtypes, add = [], TokenCache.add

    def note(cache, tokens, positions):
        add(cache, tokens, positions)
        dtypes.append(cache._batches[0][1][-1].values.dtype)

    monkeypatch.setattr(TokenCache, "add", note)
    for budget, expected in (("2.5MB", torch.float16), ("4MB", torch.float32)):
        dtypes.clear()
        fit_soap(mae_folder, photos, token_cache=budget, batch_size=8, check=0, progress=False)
        assert set(dtypes) == {expected}
