"""Single pictures of an image, drawn pixel by pixel: colours laid over it, marks on patches, an object alone."""

import numpy as np
from matplotlib.cm import ScalarMappable
from PIL import Image, ImageDraw
from torch import Tensor

from .style import MARK

SHORTEST_SIDE = 480
"""Pixels of the longer side of a panel at least, so that patches have edges and marks can be told apart."""

OPACITY = 0.65
"""Of colours over an image."""

FADING = 0.75
"""How near to white everything is that does not belong to an object."""

BAR = 256, 12
"""Pixels of a bar of colours."""

Place = tuple[int, int]
"""Row and column of a patch."""


def enlarged(image: Image.Image) -> Image.Image:
    """An RGB image, its longer side at least 480 pixels."""
    scale = SHORTEST_SIDE / max(image.size)
    if scale <= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def laid_over(image: Image.Image, values: Tensor, shown: ScalarMappable, opacity: float = OPACITY) -> Image.Image:
    """Values of patches `(rows, columns)` as colours over the image in grey."""
    image = enlarged(image)
    colours = shown.to_rgba(values.numpy(), bytes=True)[..., :3]
    return Image.blend(image.convert("L").convert("RGB"), _spread(colours, image), opacity)


def coloured(image: Image.Image, shares: Tensor) -> Image.Image:
    """Colours of patches `(rows, columns, 3)` in [0, 1], in the shape of the image."""
    return _spread((255 * shares).round().byte().numpy(), enlarged(image))


def map_panel(values: np.ndarray, shown: ScalarMappable) -> Image.Image:
    """Values `(rows, columns)` as colours, a square each; white where there is none."""
    rows, columns = values.shape
    square = -(-SHORTEST_SIDE // max(rows, columns))
    colours = shown.to_rgba(values, bytes=True)[..., :3]
    colours[np.isnan(values)] = 255
    return Image.fromarray(colours).resize((columns * square, rows * square), Image.Resampling.NEAREST)


def scale_bar(shown: ScalarMappable) -> Image.Image:
    """The colours of a scale, from its low end to its high one."""
    low, high = shown.get_clim()
    return Image.fromarray(shown.to_rgba(np.linspace(low, high, BAR[0])[None], bytes=True)[..., :3]).resize(BAR)


def faded(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The image with all faded but an object, `(height, width)` bool of any size and the image's shape."""
    smaller = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
    levels = np.asarray(image)
    light = levels + FADING * (255.0 - levels)
    return Image.fromarray(np.where(smaller[..., None], levels, light).astype(np.uint8))


def marked(
    image: Image.Image, grid: tuple[int, int], *, frame: Place | None = None, ring: Place | None = None
) -> Image.Image:
    """The image with a frame around one patch of its grid, and a ring around another; both have an edge of white."""
    image = enlarged(image).copy()
    draw, line = ImageDraw.Draw(image), max(2, round(max(image.size) / 160))
    if frame is not None:
        left, top, right, bottom = _box(image, grid, frame)
        draw.rectangle((left - line, top - line, right + line, bottom + line), outline="white", width=2 * line)
        draw.rectangle((left, top, right, bottom), outline=MARK, width=line)
    if ring is not None:
        left, top, right, bottom = _box(image, grid, ring)
        x, y, radius = (left + right) / 2, (top + bottom) / 2, max(right - left, bottom - top, 4 * line) / 2
        for more, colour, width in ((2 * line, "white", 3 * line), (line, "black", line)):
            draw.circle((x, y), radius + more, outline=colour, width=width)
    return image


def _spread(colours: np.ndarray, image: Image.Image) -> Image.Image:
    return Image.fromarray(colours).resize(image.size, Image.Resampling.NEAREST)


def _box(image: Image.Image, grid: tuple[int, int], place: Place) -> tuple[int, int, int, int]:
    """Left, top, right and bottom pixel of a patch."""
    (rows, columns), (row, column) = grid, place
    x, y = image.width / columns, image.height / rows
    return round(column * x), round(row * y), round((column + 1) * x) - 1, round((row + 1) * y) - 1
