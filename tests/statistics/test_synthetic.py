"""Synthetic images follow the released mixture, and a set depends on its seed alone."""

import json

import pytest
import torch
from torch import Tensor

from soap_hf import synthesize_images
from soap_hf.runtime.errors import SOAPError
from soap_hf.statistics.synthetic import IMAGENET_MEAN, IMAGENET_STD, _gradient, _inverse_dct, _pink_noise
from tests.conftest import DATA

NORMALISED = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def corner_means(images: Tensor, width: int) -> dict[str, float]:
    """Mean over a square in each corner, all images and channels."""
    near, far = slice(None, width), slice(-width, None)
    corners = {
        "top_left": (near, near),
        "top_right": (near, far),
        "bottom_left": (far, near),
        "bottom_right": (far, far),
    }
    return {name: float(images[:, :, rows, columns].mean()) for name, (rows, columns) in corners.items()}


def ring_powers(images: Tensor, rings: list[int]) -> dict[int, float]:
    """Mean power over spatial frequencies from `k` to `1.5 k` cycles per image."""
    size = images.shape[-1]
    power = sum(torch.fft.rfft2(part).abs().square().sum(dim=(0, 1)) for part in images.split(64))
    power /= images.shape[0] * images.shape[1]
    radius = torch.hypot(torch.fft.fftfreq(size)[:, None] * size, torch.fft.rfftfreq(size) * size)
    return {k: float(power[(radius >= k) & (radius < 1.5 * k)].mean()) for k in rings}


def test_statistics_are_those_of_the_released_mixture():
    """The power in a ring has a standard error of 6 % here and 4 % in the reference; with this seed they are close."""
    released = json.loads((DATA / "synthetic_stats.json").read_text())
    images = synthesize_images(480, released["size"], seed=1, **NORMALISED)
    corners, expected_corners = corner_means(images, 16), released["corner_mean"]
    assert float(images.mean()) == pytest.approx(released["mean"], rel=0.08)
    assert corners.pop("top_left") == pytest.approx(expected_corners.pop("top_left"), abs=0.05)
    assert corners == pytest.approx(expected_corners, rel=0.08)
    assert float(images.std(dim=0).mean()) == pytest.approx(released["std"], rel=0.05)
    expected_powers = {int(k): power for k, power in released["power_in_ring_k_to_1p5k"].items()}
    assert ring_powers(images, list(expected_powers)) == pytest.approx(expected_powers, rel=0.1)


def test_isotropic_images_are_as_bright_and_as_varied_everywhere():
    images = synthesize_images(500, 32, isotropic=True, **NORMALISED)
    corners, middle = corner_means(images, 8), float(images[:, :, 12:20, 12:20].mean())
    assert corners == pytest.approx(dict.fromkeys(corners, middle), abs=0.1)
    deviations = corner_means(images.unfold(2, 8, 8).unfold(3, 8, 8).mean(dim=(4, 5)).std(dim=0, keepdim=True), 1)
    assert deviations == pytest.approx(dict.fromkeys(deviations, deviations["top_left"]), rel=0.1)
    grey = sum((0.5 - mean) / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)) / 3
    assert float(images.mean()) == pytest.approx(grey / 2, abs=0.08)  # gradients weigh one half


@pytest.mark.parametrize(("isotropic", "rising"), [(False, 1.0), (True, 0.5)])
def test_released_gradients_never_fall_and_isotropic_ones_do_so_half_of_the_time(isotropic, rising):
    generators = [torch.Generator().manual_seed(seed) for seed in range(200)]
    gradients = _gradient(16, 24, generators, isotropic)
    for slopes in (gradients[..., -1, :] - gradients[..., 0, :], gradients[..., -1] - gradients[..., 0]):
        slopes = slopes.mean(dim=2)
        assert slopes.abs().mean() > 0.1
        assert float((slopes > 0).double().mean()) == pytest.approx(rising, abs=0.06)


@pytest.mark.parametrize("isotropic", [False, True])
def test_a_set_does_not_depend_on_its_batches(isotropic):
    whole = synthesize_images(7, (24, 16), seed=3, isotropic=isotropic)
    for batch in (1, 2, 5):
        parts = [
            synthesize_images(min(batch, 7 - start), (24, 16), seed=3, offset=start, isotropic=isotropic)
            for start in range(0, 7, batch)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_every_image_of_every_set_is_another():
    images = torch.cat([synthesize_images(20, 16, seed=seed) for seed in (0, 1, 2, -1, 2**40)])
    assert len(torch.unique(images.flatten(1), dim=0)) == len(images)


def test_channels_are_drawn_apart():
    """They share the weights of the mixture alone."""
    brightness = synthesize_images(200, 16, **NORMALISED).mean(dim=(2, 3))
    correlations = torch.corrcoef(brightness.T)[[0, 0, 1], [1, 2, 2]]
    assert correlations.abs().max() < 0.7


@pytest.mark.parametrize("size", [(24, 40), (40, 24)])
def test_size_is_height_by_width(size):
    images = synthesize_images(3, size)
    assert images.shape == (3, 3, *size)
    assert images.dtype == torch.float32
    assert torch.isfinite(images).all()


@pytest.mark.parametrize("size", [(16, 48), (48, 16), (24, 24)])
def test_pink_noise_is_as_coarse_down_as_across_and_of_unit_deviation(size):
    pink = _pink_noise(300, *size, [torch.Generator().manual_seed(0)])[0]
    down, across = pink.diff(dim=1).square().mean(), pink.diff(dim=2).square().mean()
    assert float(down / across) == pytest.approx(1, rel=0.1)
    torch.testing.assert_close(pink.std(dim=(1, 2)), torch.ones(300))


@pytest.mark.parametrize("length", [1, 2, 31])
def test_the_cosine_transform_is_orthonormal(length):
    basis = _inverse_dct(length, torch.device("cpu"))
    torch.testing.assert_close(basis @ basis.T, torch.eye(length), rtol=0, atol=1e-5)


def test_a_number_means_a_square():
    assert torch.equal(synthesize_images(2, 24), synthesize_images(2, (24, 24)))


def test_the_empty_set_has_a_shape():
    assert synthesize_images(0, (8, 6)).shape == (0, 3, 8, 6)


def test_global_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    images = synthesize_images(2, 16)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(synthesize_images(2, 16), images)


def test_mean_and_std_normalise_each_channel():
    rgb = synthesize_images(4, 16)
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    normalised = synthesize_images(4, 16, mean=mean, std=std)
    for channel in range(3):
        expected = (rgb[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(normalised[:, channel], expected)


@pytest.mark.parametrize("arguments", [(-1, 16), (2, 0), (2, -4), (2, (16, 0)), (2, (0, 16))])
def test_impossible_sizes_are_refused(arguments):
    with pytest.raises(SOAPError, match="must be positive"):
        synthesize_images(*arguments)


@pytest.mark.parametrize("half", [{"mean": IMAGENET_MEAN}, {"std": IMAGENET_STD}])
def test_half_a_normalisation_and_a_single_pixel_are_refused(half):
    with pytest.raises(SOAPError, match="both mean and std"):
        synthesize_images(1, 8, **half)
    with pytest.raises(SOAPError, match="one pixel"):
        synthesize_images(1, 1)
