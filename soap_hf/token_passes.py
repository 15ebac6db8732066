"""Passes over images: real and synthetic ones through the backbone, into the accumulators."""

import multiprocessing
import os
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from .call_convention import evaluation_mode
from .data import SHUFFLE_BUFFER, ImageSample
from .errors import DataError, NonFiniteTokensError
from .image_files import BadImage, stop_if_too_many_bad
from .modeling_soap import SOAPModelWrapper
from .preprocessing import ImagePreprocessor
from .probing import layer_tokens
from .soap_statistics import SOAPStatistics
from .synthetic import synthesize_images
from .token_statistics import PrincipalComponents, ResponseCounts, TokenMoments

logger = logging.get_logger(__name__)

LayerTokens = dict[int, Tensor]
"""Patch tokens `(B, *grid, D)` of each layer, of one batch."""


class TokenPasses:
    """Reads the patch tokens of one sample of images, as often as needed.

    Args:
        model ([`SOAPModelWrapper`]): whose backbone and layers are read; its projections are not applied.
        sample ([`ImageSample`]): the real images.
        preprocess ([`ImagePreprocessor`]): makes pixels of them.
        batch_size (`int`): images a forward pass.
        num_workers (`int`, *optional*): processes that decode; default: what the machine and the sample allow.
        max_bad_images (`float`): share of unreadable images that are skipped; at least one is.
        progress (`bool`): show a bar for each pass.

    Attributes:
        bad_images (`list[BadImage]`): those that could not be read, each once.
    """

    def __init__(
        self,
        model: SOAPModelWrapper,
        sample: ImageSample,
        preprocess: ImagePreprocessor,
        batch_size: int,
        num_workers: int | None,
        max_bad_images: float,
        progress: bool,
    ):
        self.model, self.sample, self.preprocess = model, sample, preprocess
        self.batch_size, self.max_bad_images, self.progress = batch_size, max_bad_images, progress
        self.num_workers = default_workers(sample.available) if num_workers is None else num_workers
        self.bad_images: list[BadImage] = []

    @torch.no_grad()
    def statistics(self, num_synthetic: int | None, seed: int, isotropic: bool) -> dict[int, SOAPStatistics]:
        """Components from the real images, then responses on real and synthetic ones, for each layer.

        Raises:
            DataError: too many unreadable images, or fewer than 2 readable ones.
            NonFiniteTokensError: tokens with NaN or Inf.
        """
        with evaluation_mode(self.model):
            principal = self._principal_components()
            real = self._responses(self._real("real responses"), principal)
            number = num_synthetic or next(iter(real.values())).num_images
            synthetic = self._responses(self._synthetic(number, seed, isotropic), principal)
        if self.bad_images:
            names = ", ".join(map(str, self.bad_images))
            logger.warning(f"{len(self.bad_images)} unreadable images were skipped: {names}.")
        return {layer: SOAPStatistics.from_counts(real[layer], synthetic[layer]) for layer in principal}

    def _principal_components(self) -> dict[int, PrincipalComponents]:
        moments: dict[int, TokenMoments] = {}
        images = 0
        for tokens in self._real("components"):
            for layer, patches in tokens.items():
                moments.setdefault(layer, TokenMoments(patches.shape[-1], patches.device)).update(patches)
            images += len(patches)
        if images < 2:
            raise DataError(f"A fit needs at least 2 readable images, but found {images}.")
        return {layer: single.principal_components() for layer, single in moments.items()}

    def _responses(
        self, batches: Iterable[LayerTokens], principal: dict[int, PrincipalComponents]
    ) -> dict[int, ResponseCounts]:
        counts: dict[int, ResponseCounts] = {}
        for tokens in batches:
            for layer, patches in tokens.items():
                if layer not in counts:
                    counts[layer] = ResponseCounts(principal[layer], tuple(patches.shape[1:-1]))
                counts[layer].update(patches)
        return counts

    def _real(self, phase: str) -> Iterator[LayerTokens]:
        known, seen = {bad.name for bad in self.bad_images}, 0
        with self._bar(phase, self.sample.available) as bar:
            for number, (pixels, bad) in enumerate(
                self.sample.batches(self.preprocess, self.batch_size, self.num_workers), start=1
            ):
                self.bad_images += [image for image in bad if image.name not in known]
                count = len(bad) + (0 if pixels is None else len(pixels))
                seen += count
                expected = self.sample.available or max(seen, SHUFFLE_BUFFER)
                stop_if_too_many_bad(self.bad_images, self.max_bad_images, seen, expected)
                if pixels is not None:
                    yield self._tokens(pixels, f"batch {number} of the {phase}")
                bar.update(count)
        # a stream may hold fewer images than were asked for
        stop_if_too_many_bad(self.bad_images, self.max_bad_images, seen, seen)

    def _synthetic(self, num: int, seed: int, isotropic: bool) -> Iterator[LayerTokens]:
        with self._bar("synthetic responses", num) as bar:
            for number, offset in enumerate(range(0, num, self.batch_size), start=1):
                count = min(self.batch_size, num - offset)
                images = synthesize_images(
                    count, self.preprocess.size, seed, offset=offset, isotropic=isotropic, device=self.model.device
                )
                yield self._tokens(self.preprocess.normalize(images), f"batch {number} of the synthetic responses")
                bar.update(count)

    def _tokens(self, pixels: Tensor, where: str) -> LayerTokens:
        pixels = pixels.to(self.model.device, self.model.dtype)
        height, width = pixels.shape[-2:]
        with self.model.disabled():
            outputs = self.model(pixels)
        tokens = {}
        for layer, layout in self.model.layouts.items():
            tokens[layer] = layout.patches(layer_tokens(outputs, layer), (height, width))
            if tokens[layer].device.type == "mps":  # which has no float64 for the statistics
                tokens[layer] = tokens[layer].cpu()
            if not torch.isfinite(tokens[layer]).all():
                raise NonFiniteTokensError(
                    f"The patch tokens of {where} hold NaN or Inf in {self.model.dtype}: "
                    f"{'check its weights' if self.model.dtype == torch.float32 else 'try dtype=float32'}."
                )
        return tokens

    def _bar(self, phase: str, total: int | None) -> tqdm:
        return tqdm(total=total, desc=phase, unit=" images", disable=not self.progress)


def default_workers(num_images: int | None) -> int:
    """Processes that decode so many images (`None`: nobody knows how many) on this machine."""
    # starting a process costs more than decoding a few images
    if num_images is not None and num_images < 200:
        return 0
    if multiprocessing.get_start_method() != "fork":  # others run an unguarded script again in each process
        return 0
    return min(4, max(1, (os.cpu_count() or 1) - 1))
