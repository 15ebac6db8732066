"""Images without content: the other half of the semantic-invariance test.

Source: the released mixture of "SOAP" (arXiv 2604.00172, code github.com/dsb-ifi/soap), in ImageNet-normalised space.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN as IMAGENET_MEAN
from transformers.image_utils import IMAGENET_DEFAULT_STD as IMAGENET_STD

from ..runtime.errors import SOAPError


def synthesize_images(
    num: int,
    size: int | tuple[int, int],
    seed: int = 0,
    *,
    offset: int = 0,
    isotropic: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Draws images without semantic content.

    Each image is a mixture of (1) white noise modulated by clipped pink noise, (2) pink noise of amplitude 1/f and
    (3) a linear gradient per channel, with Dirichlet(1, 1, 2) weights. Every image has a generator of its own, seeded
    by `seed` and its number: a set does not depend on how it is cut into batches (on one device type).

    Args:
        num (`int`): how many images, of `size` (`int` or `(height, width)`) in pixels.
        seed (`int`, defaults to 0): names the set.
        offset (`int`, defaults to 0): number of the first image in the set, so that batches are slices of one set.
        isotropic (`bool`, defaults to `False`): the released gradients never fall, so they brighten to the bottom
            right; with `True` their directions are uniform and the mean brightness is the same everywhere.
        mean, std (three floats each, *optional*): if given, images come normalised with them, as a backbone expects.
        device (`str` or `torch.device`, defaults to `"cpu"`): where the images are drawn.

    Returns:
        `torch.Tensor` of shape `(num, 3, height, width)`, float32: RGB with nominal range [0, 1], neither clipped nor
        rounded; `(rgb - mean) / std` if `mean` and `std` are given.

    Raises:
        SOAPError: `num` is negative, `size` is below two pixels, or only one of `mean` and `std` is given.

    Example:
        >>> images = synthesize_images(4, (32, 48), seed=1)
        >>> images.shape
        torch.Size([4, 3, 32, 48])
        >>> bool((synthesize_images(2, (32, 48), seed=1, offset=2) == images[2:]).all())
        True
    """
    height, width = (size, size) if isinstance(size, int) else size
    if num < 0 or height < 1 or width < 1:
        raise SOAPError(f"Cannot draw {num} images of {height} x {width} pixels; both must be positive.")
    if height * width == 1:
        raise SOAPError("An image of one pixel has no noise to scale; ask for at least two.")
    if (mean is None) != (std is None):
        raise SOAPError("Normalisation needs both mean and std; pass the other one as well, or neither.")
    device = torch.device(device)
    generators = [_generator(seed, offset + row, device) for row in range(num)]
    # an accelerator wants few launches; on CPU one at a time is as fast, and rounds alike in any batch
    together = 1 if device.type == "cpu" else max(1, num)
    images = torch.empty(num, 3, height, width, device=device)
    for first in range(0, num, together):
        some = slice(first, first + together)
        images[some] = _mixture(height, width, generators[some], isotropic)
    rgb = images * _channels(IMAGENET_STD, device) + _channels(IMAGENET_MEAN, device)
    if mean is None or std is None:
        return rgb
    return (rgb - _channels(mean, device)) / _channels(std, device)


def _generator(seed: int, index: int, device: torch.device) -> torch.Generator:
    # splitmix64: neighbouring (seed, index) pairs give unrelated streams
    mixed = (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + 1) & (2**64 - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & (2**64 - 1)
    return torch.Generator(device).manual_seed((mixed ^ (mixed >> 31)) >> 1)


def _mixture(height: int, width: int, generators: list[torch.Generator], isotropic: bool) -> Tensor:
    """One image per generator, `(B, 3, height, width)`, in ImageNet-normalised space."""
    device = generators[0].device
    mean, std = _channels(IMAGENET_MEAN, device), _channels(IMAGENET_STD, device)
    share = _dirichlet_112(generators)[..., None, None, None]
    pink = _pink_noise(4, height, width, generators)
    noise = _draw(torch.randn, (3, height, width), generators)
    modulation = (pink[:, 3:] * std + mean).clamp(0, 1)
    gradient = (_gradient(height, width, generators, isotropic) - mean) / std
    return share[:, 0] * noise * modulation + share[:, 1] * pink[:, :3] + share[:, 2] * gradient


def _draw(distribution: Callable[..., Tensor], shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    """Random numbers `(B, *shape)`, those of each image from its own generator."""
    drawn = torch.empty(len(generators), *shape, device=generators[0].device)
    for row, generator in zip(drawn, generators, strict=True):
        distribution(shape, generator=generator, device=drawn.device, out=row)
    return drawn


def _dirichlet_112(generators: list[torch.Generator]) -> Tensor:
    """Dirichlet(1, 1, 2) `(B, 3)`: exponentials divided by their sum; Gamma(2) is the sum of two of them."""
    exponential = -torch.log1p(-_draw(torch.rand, (4,), generators))
    gamma = torch.cat((exponential[:, :2], exponential[:, 2:].sum(dim=1, keepdim=True)), dim=1)
    return gamma / gamma.sum(dim=1, keepdim=True)


def _pink_noise(channels: int, height: int, width: int, generators: list[torch.Generator]) -> Tensor:
    """1/f noise with unit standard deviation per channel: its DCT spectrum is drawn directly, then inverted."""
    spectrum = _draw(torch.randn, (channels, height, width), generators)
    spectrum *= _pink_amplitude(height, width, spectrum.device)
    pink = _inverse_dct(height, spectrum.device).T @ spectrum @ _inverse_dct(width, spectrum.device)
    return pink / pink.std(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(pink.dtype).tiny)


@lru_cache(maxsize=8)
def _pink_amplitude(height: int, width: int, device: torch.device) -> Tensor:
    longer = max(height, width)
    rows = torch.arange(height, device=device)[:, None] * (longer / height)
    columns = torch.arange(width, device=device) * (longer / width)
    frequency = torch.sqrt(rows**2 + columns**2)
    frequency[0, 0] = 1
    return 1 / frequency


@lru_cache(maxsize=8)
def _inverse_dct(length: int, device: torch.device) -> Tensor:
    """Rows are the orthonormal DCT-II basis vectors, so `basis.T @ spectrum` inverts the transform."""
    position = torch.arange(length, dtype=torch.float64)
    basis = torch.cos(math.pi / length * (position[None, :] + 0.5) * position[:, None]) * math.sqrt(2 / length)
    basis[0] /= math.sqrt(2)
    return basis.to(device, torch.float32)


def _gradient(height: int, width: int, generators: list[torch.Generator], isotropic: bool) -> Tensor:
    """A linear gradient per channel in RGB, clipped to [0, 1]; `(B, 3, height, width)`."""
    device = generators[0].device
    down, right, bias = _draw(torch.rand, (3, 3, 1, 1), generators).unbind(dim=1)
    y, x = torch.linspace(0, 1, height, device=device)[:, None], torch.linspace(0, 1, width, device=device)
    if isotropic:
        angle = 2 * math.pi * _draw(torch.rand, (3, 1, 1), generators)
        slope = torch.sqrt(down**2 + right**2)
        # symmetric about mid-grey at the centre: clipping then favours no place
        return (bias + slope * (torch.sin(angle) * (y - 0.5) + torch.cos(angle) * (x - 0.5))).clamp(0, 1)
    return (bias + down * y + right * x).clamp(0, 1)


def _channels(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)
