"""Retrieval by a patch: the photographs in which something most like it lies, as thumbnails."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from PIL import Image, ImageOps

from ..heads.model import SOAPModelWrapper
from ..runtime.errors import DataError
from .panels import Place, marked
from .pictures import Picture, look_at
from .placing import GAP, LINE, MARGIN, place_axes, place_text, show
from .similarity import best_match, patch_at, similarities
from .style import new_figure, styled

SIDE = 1.05
"""Inches of a thumbnail."""

PIXELS = 480


class Neighbour(NamedTuple):
    """A photograph, by its number, the patch of it that is most like the query, and the cosine of the two."""

    number: int
    patch: Place
    cosine: float


@styled
def patch_neighbours(
    model: SOAPModelWrapper,
    images: Sequence[Image.Image],
    *,
    query: int = 0,
    patch: tuple[float, float] = (0.5, 0.5),
    neighbours: int = 5,
    layer: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> Figure:
    """The photographs most like one patch of a query, by their best patch: by raw tokens above, by clean ones below.

    Frames mark the patch and its answers. Tokens that say where a patch is answer from the same place, whatever lies
    there.

    Args:
        model ([`SOAPModelWrapper`]): a head and its backbone.
        images (sequence of `PIL.Image.Image`): two photographs or more, any mode and size.
        query (`int`, defaults to 0): the number of the photograph that asks.
        patch (`(float, float)`, defaults to the middle): where its patch lies, as shares of the height and the width.
        neighbours (`int`, defaults to 5): photographs to show.
        layer (`int`, *optional*), image_size (`(height, width)`, *optional*): as in [`look_at`].

    Raises:
        DataError: fewer than two images, no such query, `patch` lies outside, or `neighbours` is below 1.
    """
    if len(images) < 2 or not 0 <= query < len(images) or neighbours < 1:
        raise DataError(
            f"Neighbours need two images or more, a query among them and a count from 1, not {len(images)} images, "
            f"query {query} and {neighbours} neighbours."
        )
    patch_at(patch, (1, 1))
    pictures = look_at(model, images, layer=layer, image_size=image_size)
    place = patch_at(patch, pictures[query].grid)
    count = min(neighbours, len(images) - 1)
    row_height = LINE + 0.05 + SIDE + LINE + GAP
    figure = new_figure(2 * MARGIN + (count + 1) * (SIDE + GAP) - GAP, 2 * row_height + MARGIN)
    for line, method in enumerate(pictures[query].tokens):
        top = MARGIN + line * row_height
        found = nearest_patches(pictures, query, place, method)[:count]
        place_text(figure, MARGIN, top, f"by {'raw' if method == 'raw' else 'clean'} tokens")
        shown = [(query, place, "query"), *((one.number, one.patch, f"{one.cosine:.2f}") for one in found)]
        for column, (number, where, words) in enumerate(shown):
            left = MARGIN + column * (SIDE + GAP)
            picture = pictures[number]
            thumbnail = marked(picture.image, picture.grid, frame=where)
            axes = place_axes(figure, left, top + LINE + 0.05, SIDE, SIDE)
            axes.axis("off")
            show(axes, ImageOps.pad(thumbnail, (PIXELS, PIXELS), color="white"))
            place_text(figure, left + SIDE / 2, top + LINE + 0.07 + SIDE, words, ha="center", color="0.4")
    return figure


def nearest_patches(pictures: Sequence[Picture], query: int, patch: Place, method: str) -> list[Neighbour]:
    """The best patch of each other picture, the most similar first, by tokens of `"raw"` or `"soap"`."""
    own, found = pictures[query].tokens[method], []
    for number, picture in enumerate(pictures):
        if number != query:
            cosines = similarities(own, picture.tokens[method], patch)
            best = best_match(cosines)
            assert best is not None  # there is no patch besides which it is looked for
            found.append(Neighbour(number, best, float(cosines[best])))
    return sorted(found, key=lambda one: -one.cosine)
