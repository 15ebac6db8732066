"""What a head does to images of yours: responses laid over them, and patch tokens as colours."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ..data.preprocessing import to_rgb
from ..evaluation.comparison import Comparison
from ..evaluation.salient_object import in_whole_patches, patch_stride, raw_grid, resized
from ..heads.model import SOAPModelWrapper
from ..runtime.errors import DataError, SOAPError
from ..statistics.token_statistics import TokenMoments
from .panels import coloured, laid_over
from .placing import COLORBAR_HEIGHT, picture_grid, place_colorbar, show
from .records import FittedHead, scored_layers, stored_components
from .style import SIGNED, styled

COMPONENTS = 4
"""Whose responses are laid over an image."""

RESPONSE_LIMIT = 2.0
"""Standard deviations at which the colours of responses end."""

COLOUR_QUANTILES = 0.01, 0.99
"""Where the colours of a component begin and end."""

DISPLAYED_SIDE = 600
"""Pixels of an image in a figure; more would not be seen."""


@dataclass(frozen=True)
class Picture:
    """An image, and its patch tokens.

    Attributes:
        image (`PIL.Image.Image`): RGB, in its own shape, up to 600 pixels a side.
        layer (`int`): the layer of the tokens.
        tokens (`dict[str, torch.Tensor]` of shape `(rows, columns, D)`): `"raw"` and `"soap"`, of one forward pass; of
            a clip, means over its frames.
    """

    image: Image.Image
    layer: int
    tokens: dict[str, Tensor]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns, _ = self.tokens["raw"].shape
        return rows, columns


def look_at(
    model: SOAPModelWrapper,
    images: Iterable[Image.Image],
    *,
    layer: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> list[Picture]:
    """Runs the backbone once on each image.

    Args:
        model ([`SOAPModelWrapper`]): a head and its backbone.
        images (iterable of `PIL.Image.Image`): any mode and size.
        layer (`int`, *optional*): one of the head's layers; default: the last one.
        image_size (`(height, width)`, *optional*): resize all images to that, for a backbone that takes no other. By
            default they keep their shape, on about as many pixels as the images of the fit had, in whole patches.

    Raises:
        HeadError: the head has no such layer.
        BackboneError: the backbone cannot take images of that size.
        DataError: no image.
    """
    comparison = Comparison.of(model, layer=layer)
    pictures = [picture_of(comparison, to_rgb(image), image_size) for image in images]
    if not pictures:
        raise DataError("A figure of images needs at least one.")
    return pictures


def picture_of(comparison: Comparison, image: Image.Image, image_size: tuple[int, int] | None = None) -> Picture:
    """As [`look_at`], of one RGB image: the tokens of every method of a comparison, from one forward pass."""
    scale = math.sqrt(math.prod(comparison.preprocess.size) / math.prod(image.size))
    own_size = (
        max(1, round(image.height * scale)),
        max(1, round(image.width * scale)),
    )  # on as many pixels as in the fit
    raw = raw_grid(comparison, resized(image, image_size or in_whole_patches(own_size, patch_stride(comparison))))
    tokens = {name: projection(raw).cpu() for name, projection in comparison.methods.items()}
    return Picture(displayed(image), comparison.layer, tokens)


def displayed(image: Image.Image) -> Image.Image:
    """An image, small enough for a figure."""
    image = image.copy()
    image.thumbnail((DISPLAYED_SIDE, DISPLAYED_SIDE))
    return image


@styled
def response_overlay(pictures: Sequence[Picture], head: FittedHead) -> Figure:
    """Images, one per row, with the responses of the four highest-scoring components laid over them.

    The response of a raw token `z` to a component `v` is `(z - m)·v`, in standard deviations of the fit's tokens.

    Args:
        pictures (list of [`Picture`]): as [`look_at`] gives them.
        head ([`SOAPModelWrapper`] or [`HeadRecord`]): the same head, with statistics.

    Raises:
        HeadError: the head was saved without statistics.
    """
    place = head.config.layers.index(pictures[0].layer)
    components = stored_components(scored_layers(head)[place], COMPONENTS)
    titles = ["\nimage", *(component.caption for component in components)]
    figure, rows = picture_grid([picture.image for picture in pictures], titles, room=COLORBAR_HEIGHT)
    shown = response_scale()
    for picture, (first, *others) in zip(pictures, rows, strict=True):
        show(first, picture.image)
        for axes, component in zip(others, components, strict=True):
            show(axes, laid_over(picture.image, component.response(picture.tokens["raw"]), shown))
    place_colorbar(figure, shown, "response in standard deviations", extend="both")
    return figure


def response_scale() -> ScalarMappable:
    """The colours of responses, in standard deviations."""
    return ScalarMappable(Normalize(-RESPONSE_LIMIT, RESPONSE_LIMIT), SIGNED)


@styled
def token_colours(pictures: Sequence[Picture]) -> Figure:
    """Images, one per row, with their patch tokens as colours: raw, clean, and what was removed.

    Red, green and blue are the three leading principal components of the raw tokens of all the images. All are
    projected on them, and a colour means the same in raw and clean: they differ by what the head removes, and by
    nothing else. That difference has the same scale, with grey where nothing was removed.

    Args:
        pictures (list of [`Picture`]): as [`look_at`] gives them.
    """
    colours = colours_of(pictures, colour_axes(pictures), with_removed=True)
    titles = ["image", "raw tokens", "clean tokens", "removed"]
    figure, rows = picture_grid([picture.image for picture in pictures], titles)
    for picture, methods, (first, *others) in zip(pictures, colours, rows, strict=True):
        show(first, picture.image)
        for panel, shares in zip(others, methods.values(), strict=True):
            show(panel, coloured(picture.image, shares))
    return figure


def colour_axes(pictures: Sequence[Picture]) -> Tensor:
    """The three leading principal components of the raw tokens of all pictures, `(D, 3)` float64.

    Zeros stand for those without variance.
    """
    dim = pictures[0].tokens["raw"].shape[-1]
    moments = TokenMoments(dim)
    for picture in pictures:
        moments.update(picture.tokens["raw"])
    try:
        principal = moments.principal_components()
        return principal.components[:, :3] * principal.resolved[:3]
    except SOAPError:  # one token, or all alike: one colour
        return torch.zeros(dim, 3, dtype=torch.float64)


def colours_of(pictures: Sequence[Picture], axes: Tensor, with_removed: bool = False) -> list[dict[str, Tensor]]:
    """Red, green and blue of each picture's tokens by method, `(rows, columns, 3)` in [0, 1], by one rule for all.

    With `"removed"`, raw without clean on the same scale, where 0.5 is nothing.
    """
    places = [{name: tokens.double() @ axes for name, tokens in picture.tokens.items()} for picture in pictures]
    values = torch.cat([value.flatten(0, -2) for picture in places for value in picture.values()])
    low, high = torch.quantile(values, torch.tensor(COLOUR_QUANTILES, dtype=values.dtype), dim=0)
    shares = [
        {name: ((value - low) / (high - low)).nan_to_num(0.5).clamp(0, 1) for name, value in picture.items()}
        for picture in places
    ]
    if with_removed:
        for own, picture in zip(shares, places, strict=True):
            removed = (picture["raw"] - picture["soap"]) / (high - low)
            own["removed"] = (0.5 + removed).nan_to_num(0.5).clamp(0, 1)
    return shares
