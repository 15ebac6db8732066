"""The salient object of one image, from the tokens of a head: its own size in whole patches, TokenCut, refinement."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..runtime.errors import BackboneError, SOAPError, first_sentence
from .comparison import Comparison
from .segmentation import patch_of_pixel
from .tokencut import token_cut

MAX_PATCHES = 4096
"""Images of more patches are shrunk for the backbone: the graph of TokenCut has their square for edges."""

STRIDE_OF_MAPS = 32
"""Of backbones that return maps, which do not tell theirs."""


def nothing_to_cut(centred: bool = False) -> str:
    """Why a mask is empty, in words for whoever does not know TokenCut, and what may help."""
    why = "all of its patches look alike to TokenCut (or no two of them do), which leaves it nothing to cut out"
    return why if centred else f"{why}; centred=True (--centred) takes the mean token away first, which may help"


def patch_stride(comparison: Comparison) -> int:
    """Pixels from one patch of a backbone to the next."""
    return comparison.model.layouts[comparison.layer].stride or STRIDE_OF_MAPS


def is_shrunk(size: tuple[int, int], stride: int) -> bool:
    """Whether an image has more patches than `MAX_PATCHES`."""
    return math.prod(size) > MAX_PATCHES * stride**2


def in_whole_patches(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """The nearest size of whole patches, at least one; of an image of more than `MAX_PATCHES`, of about so many.

    Example:
        >>> in_whole_patches((300, 400), 14), in_whole_patches((5, 400), 14)
        ((294, 406), (14, 406))
        >>> in_whole_patches((3000, 4000), 14)
        (770, 1036)
    """
    scale = math.sqrt(MAX_PATCHES * stride**2 / math.prod(size)) if is_shrunk(size, stride) else 1.0
    height, width = (max(1, round(side * scale / stride)) * stride for side in size)
    return height, width


def resized(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """An RGB image resized with Lanczos' filter, `(3, height, width)` uint8."""
    return torch.from_numpy(np.array(image.resize(size[::-1], Image.Resampling.LANCZOS))).permute(2, 0, 1)


def raw_grid(comparison: Comparison, rgb: Tensor) -> Tensor:
    """Raw patch tokens of one image on rows and columns, `(rows, columns, D)`; of a clip, means over its frames.

    The image is `(3, H, W)` uint8. The mean and std of the head's image processor apply, but not its resize and crop.

    Raises:
        BackboneError: the backbone cannot take this size.
        NonFiniteTokensError: a token holds NaN or Inf.
    """
    pixels = comparison.preprocess.normalize(rgb[None].to(torch.float32) / 255)
    try:
        patches = comparison.raw_tokens(pixels).patches[0]
    except SOAPError:
        raise
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise BackboneError(
            f"{type(comparison.model.backbone).__name__} cannot take images of {rgb.shape[1]} x {rgb.shape[2]} pixels "
            f"({first_sentence(error)}); pass an image_size that it takes."
        ) from error
    return patches.mean(dim=0) if patches.ndim == 4 else patches


def coarse_mask(tokens: Tensor, size: tuple[int, int]) -> np.ndarray | None:
    """The salient object as `token_cut` finds it, up-sampled (nearest) to an image of `size`, `(H, W)` bool.

    `None` if there is nothing to divide.
    """
    patches = token_cut(tokens)
    if patches is None:
        return None
    return patches.ravel()[patch_of_pixel(size, (patches.shape[0], patches.shape[1])).numpy()]
