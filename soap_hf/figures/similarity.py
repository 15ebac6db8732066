"""What a patch resembles: its cosine to every patch of its own and of another photograph."""

from collections.abc import Sequence

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import normalize

from ..data.preprocessing import to_rgb
from ..heads.model import SOAPModelWrapper
from ..runtime.errors import DataError
from .panels import Place, laid_over, marked
from .pictures import Picture, look_at
from .placing import COLORBAR_HEIGHT, picture_grid, place_colorbar, show
from .style import ORDERED, styled

OPACITY = 0.75


def similarities(own: Tensor, others: Tensor, patch: Place) -> Tensor:
    """The cosine of one patch of `own` to every patch of `others`, `(rows, columns)` float32; both `(…, …, D)`."""
    return normalize(others.float(), dim=-1) @ normalize(own[patch].float(), dim=-1)


def best_match(cosines: Tensor, besides: Place | None = None) -> Place | None:
    """Row and column of the highest cosine, `besides` one patch; `None` if there is no other."""
    if besides is not None:
        cosines = cosines.index_put((torch.tensor(besides[:1]), torch.tensor(besides[1:])), torch.tensor(-torch.inf))
    row, column = divmod(int(cosines.argmax()), cosines.shape[1])
    return (row, column) if cosines[row, column] > -torch.inf else None


def similarity_scale(lowest: float) -> ScalarMappable:
    """Colours of cosines, from the lowest to 1."""
    return ScalarMappable(Normalize(min(lowest, 1 - 1e-6), 1), ORDERED)


def similarity_panel(
    picture: Picture, cosines: Tensor, shown: ScalarMappable, *, patch: Place | None = None
) -> Image.Image:
    """A map of cosines over its image: a frame around the patch if it lies there, a ring around the best match."""
    ring = best_match(cosines, patch)
    over = laid_over(picture.image, cosines, shown, OPACITY)
    return marked(over, (cosines.shape[0], cosines.shape[1]), frame=patch, ring=ring)


def patch_at(shares: tuple[float, float], grid: tuple[int, int]) -> Place:
    """The patch at a place, given as shares of the height and the width.

    Example:
        >>> patch_at((0.5, 1.0), (4, 6))
        (2, 5)

    Raises:
        DataError: it lies outside.
    """
    if not all(0 <= share <= 1 for share in shares):
        raise DataError(f"patch must lie between 0 and 1 of the height and of the width, not at {shares}.")
    (down, across), (rows, columns) = shares, grid
    return min(int(down * rows), rows - 1), min(int(across * columns), columns - 1)


@styled
def similarity_maps(
    model: SOAPModelWrapper,
    images: Sequence[Image.Image],
    *,
    layer: int | None = None,
    patch: tuple[float, float] = (0.5, 0.5),
) -> Figure:
    """What a patch resembles: its cosine to every patch of its own and of the next photograph, raw and clean.

    One row per photograph; the patch has a frame, the best match of each map a ring. Colours mean the same in the
    whole figure. The next photograph, of the last one the first, is cut to the same shape.

    Args:
        model ([`SOAPModelWrapper`]): a head and its backbone.
        images (sequence of `PIL.Image.Image`): two photographs or more, any mode and size.
        layer (`int`, *optional*): one of the head's layers; default: the last one.
        patch (`(float, float)`, defaults to the middle): where the patch lies, as shares of the height and the width.

    Raises:
        DataError: fewer than two images, or `patch` lies outside.
    """
    if len(images) < 2:
        raise DataError("A figure of similarity needs two images or more.")
    patch_at(patch, (1, 1))
    rows = []
    for image, other in zip(images, [*images[1:], images[0]], strict=True):
        first, second = look_at(model, [image, ImageOps.fit(to_rgb(other), image.size)], layer=layer)
        place = patch_at(patch, first.grid)
        maps = [
            (picture, similarities(own, picture.tokens[name], place), framed)
            for name, own in first.tokens.items()
            for picture, framed in ((first, place), (second, None))
        ]
        rows.append((marked(first.image, first.grid, frame=place), maps))
    shown = similarity_scale(min(float(cosines.min()) for _, maps in rows for _, cosines, _ in maps))
    titles = ["patch", "raw: same", "raw: next", "clean: same", "clean: next"]
    figure, panels = picture_grid([image for image, _ in rows], titles, room=COLORBAR_HEIGHT)
    for (framed_image, maps), (first_axes, *others) in zip(rows, panels, strict=True):
        show(first_axes, framed_image)
        for axes, (picture, cosines, framed) in zip(others, maps, strict=True):
            show(axes, similarity_panel(picture, cosines, shown, patch=framed))
    place_colorbar(figure, shown, "cosine to the patch in the frame; a ring marks the best match")
    return figure
