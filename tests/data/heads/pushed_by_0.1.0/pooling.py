"""One vector for an image, made of its tokens."""

from typing import Literal

import torch
from torch import Tensor

from .errors import LayoutError
from .patch_layout import PatchLayout

Pooling = Literal["mean", "cls", "cls+mean"]
POOLINGS: tuple[Pooling, ...] = ("mean", "cls", "cls+mean")


def pool_tokens(tokens: Tensor, layout: PatchLayout, image_size: tuple[int, int], pooling: Pooling) -> Tensor:
    """One vector for each image.

    Args:
        tokens (`torch.Tensor`): what the backbone returned, in this layout's order.
        layout ([`PatchLayout`]): where its patch tokens lie.
        image_size (`(height, width)`): of the pixels that went in.
        pooling (`str`): `"mean"` over the patch tokens, `"cls"` for the first token before them, `"cls+mean"` for both
            side by side.

    Returns:
        `torch.Tensor` of shape `(B, D)`, or `(B, 2 * D)` for both.

    Raises:
        LayoutError: an unknown pooling, or no token before the patches.

    Example:
        >>> layout = PatchLayout(prefix=1, stride=8)
        >>> pool_tokens(torch.zeros(2, 1 + 16, 4), layout, (32, 32), "cls+mean").shape
        torch.Size([2, 8])
    """
    if pooling not in POOLINGS:
        raise LayoutError(f"pooling must be one of {', '.join(POOLINGS)}, not {pooling!r}.")
    parts = []
    if "cls" in pooling:
        if layout.prefix == 0:
            raise LayoutError(f"This backbone has no token before its patches, so pooling={pooling!r} cannot be.")
        parts.append(tokens[:, 0])
    if "mean" in pooling:
        parts.append(layout.patches(tokens, image_size).flatten(1, -2).mean(dim=1))
    return torch.cat(parts, dim=-1)
