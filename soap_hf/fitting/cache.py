"""Patch tokens kept in memory, so that each image passes through the backbone once."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.errors import DataError

LayerTokens = dict[int, Tensor]
"""Patch tokens `(B, *grid, D)` of each layer, of one batch."""


class Packed(NamedTuple):
    """Patch tokens as a cache holds them."""

    values: Tensor
    scale: Tensor | None = None

    def halved(self) -> "Packed":
        """In 16 bits."""
        if self.values.element_size() <= 2:
            return self
        scale = self.values.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return Packed((self.values / scale).half(), scale.float())

    def tokens(self) -> Tensor:
        """The patch tokens."""
        return self.values if self.scale is None else self.values.float() * self.scale

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)


class TokenCache:
    """Tokens of the first images of a sample, in memory: as they are while few, then all of them in 16 bits.

    In 16 bits a token is float16, scaled by its largest entry; tokens that take no more anyway stay as they are.

    Args:
        num_whole (`int`): so many images are kept as they are.
        num_images (`int`, *optional*): positions `0 … num_images - 1` of the sample are kept, others passed over.
            Default: `num_whole`.

    Example:
        >>> cache = TokenCache(3)
        >>> cache.add({-1: torch.ones(4, 2, 2, 8)}, positions=[1, 2, 3, 4])
        >>> [tokens[-1].shape for tokens in cache.batches()]
        [torch.Size([2, 2, 2, 8])]
    """

    def __init__(self, num_whole: int, num_images: int | None = None):
        self.num_whole, self.num_images = num_whole, num_whole if num_images is None else num_images
        self._halving = False
        self._batches: list[tuple[list[int], dict[int, Packed]]] = []

    def add(self, tokens: LayerTokens, positions: list[int]) -> None:
        """Keeps those tokens whose position counts; `positions` are those of the `B` images in the sample."""
        rows = [row for row, position in enumerate(positions) if position < self.num_images]
        if rows:
            self.halve_if_more_than_whole(positions[-1] + 1)
            packed = {layer: Packed(patches[rows].cpu()) for layer, patches in tokens.items()}
            self._batches.append(([positions[row] for row in rows], self._halved(packed)))

    def halve_if_more_than_whole(self, num_images: int) -> None:
        """Turns all tokens to 16 bits if the sample has more images than are kept as they are."""
        if num_images > self.num_whole and not self._halving:
            self._halving = True
            for number, (positions, packed) in enumerate(self._batches):  # one at a time, to stay in the budget
                self._batches[number] = positions, self._halved(packed)

    def batches(self, num_images: int | None = None) -> Iterator[LayerTokens]:
        """The tokens, batch by batch in main memory; those of the first `num_images` positions if given."""
        for positions, packed in self._batches:
            rows = [row for row, at in enumerate(positions) if num_images is None or at < num_images]
            if rows:
                yield {layer: each.tokens()[rows] for layer, each in packed.items()}

    def clear(self) -> None:
        """Forgets all tokens."""
        self._batches.clear()

    def _halved(self, packed: "dict[int, Packed]") -> "dict[int, Packed]":
        return {layer: each.halved() for layer, each in packed.items()} if self._halving else packed


PROBE_IMAGES = 64
"""Real and synthetic images, of each, by whose tokens a fit judges on its way whether it has settled."""


def plan_cache(tokens: LayerTokens, budget: int, step_size: int) -> tuple[TokenCache, int]:
    """The cache for a fit's real images, and how many synthetic ones to keep as a probe.

    `tokens` are of a batch, for the sizes, `budget` the bytes that all processes have together, and `step_size` the
    images that they work off at a time. A budget too small for one step is refused.
    """
    packed = [Packed(patches[:1]) for patches in tokens.values()]  # of one image
    whole, halved = (sum(each.nbytes for each in some) for some in (packed, [each.halved() for each in packed]))
    num_probes = max(1, min(PROBE_IMAGES, budget // (8 * whole)))
    left = budget - num_probes * whole
    if left < step_size * halved:
        least = math.ceil((step_size * halved + whole) * 8 / 7 / 1e6)
        raise DataError(
            f"A token cache of {budget / 1e6:.3g} MB cannot hold the tokens of {step_size} images, one step; give it "
            f"{least}MB or more, take smaller batches, or read all images twice (exact)."
        )
    return TokenCache(left // whole, left // halved), num_probes
