"""Two views of one photograph whose geometry is known."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from .arguments import ViewRule

LEAST_PIXELS = 2
"""Of a photograph along one patch of its smallest crop; with fewer, a patch would show nothing."""

MOST_DRAWS = 100
"""Pairs drawn of one photograph before it is given up."""


class ViewPair(NamedTuple):
    """Two images of one size, and where the points of the first lie in the second.

    Attributes:
        views (`torch.Tensor` of shape `(2, 3, H, W)`, uint8): RGB.
        homography (`torch.Tensor` of shape `(3, 3)`, float64): takes `(x, y, 1)` of the first view to the second, both
            from 0 at the left and upper edge to 1 at the right and lower one.
    """

    views: Tensor
    homography: Tensor


def draw_views(
    image: Image.Image, rule: ViewRule, size: tuple[int, int], grid: tuple[int, int], generator: np.random.Generator
) -> ViewPair | str:
    """A random pair of views that counts, or why there is none, in a clause.

    The photograph is RGB, `size` the `(height, width)` of the views in pixels, `grid` the `(rows, columns)` of their
    patches.

    Example:
        >>> photograph = Image.new("RGB", (100, 80))
        >>> pair = draw_views(photograph, ViewRule(), (64, 64), (8, 8), np.random.default_rng(0))
        >>> pair.views.shape
        torch.Size([2, 3, 64, 64])
        >>> draw_views(photograph.resize((20, 10)), ViewRule(), (64, 64), (8, 8), np.random.default_rng(0))
        'of 20 x 10 pixels it is too small for two views of 8 x 8 patches'
    """
    fitting = min(image.height / size[0], image.width / size[1])  # crops have the shape of the views
    largest = np.array([size[1], size[0]]) * fitting
    if (largest * rule.smallest_crop < LEAST_PIXELS * np.array(grid[::-1])).any():
        shape = f"{image.width} x {image.height} pixels"
        return f"of {shape} it is too small for two views of {grid[0]} x {grid[1]} patches"
    for _ in range(MOST_DRAWS):
        sides = largest * generator.uniform(rule.smallest_crop, rule.largest_crop, (2, 1))
        corners = generator.uniform(0, np.array([image.width, image.height]) - sides)
        mirrored = rule.flip and bool(generator.integers(2))
        homography = _between(corners, sides, mirrored)
        if counts(homography, rule, grid):
            views = []
            for left, top, right, bottom in np.concatenate([corners, corners + sides], axis=1):
                view = image.resize(size[::-1], Image.Resampling.BICUBIC, box=(left, top, right, bottom))
                for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                    view = enhance(view).enhance(generator.uniform(1 - rule.jitter, 1 + rule.jitter))
                views.append(np.asarray(view))
            if mirrored:
                views[1] = views[1][:, ::-1]
            return ViewPair(torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2), homography)
    return f"no two views of it overlap by {rule.least_overlap:g} and differ by {rule.least_move:g} patches"


def true_places(homography: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where the patch centres of the first view lie in the second, in patches, and which of them lie inside.

    The homography is as in [`ViewPair`]. Places are `(rows · columns, 2)` float64, `(row, column)` from 0 at the edge,
    so that the centre of the first patch is at (0.5, 0.5); whether each is inside is `(rows · columns,)` bool.

    Example:
        >>> places, inside = true_places(torch.eye(3, dtype=torch.float64), (1, 2))
        >>> places.tolist(), inside.tolist()
        ([[0.5, 0.5], [0.5, 1.5]], [True, True])
    """
    rows, columns = grid
    centres = patch_centres(grid)
    points = torch.stack([centres[:, 1] / columns, centres[:, 0] / rows, torch.ones(len(centres))], dim=1)
    moved = points.double() @ homography.T
    ahead = moved[:, 2] > 0  # the others lie behind the camera
    x, y = (moved[:, axis] / torch.where(ahead, moved[:, 2], 1.0) for axis in (0, 1))
    inside = ahead & (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
    return torch.stack([y * rows, x * columns], dim=1), inside


def patch_centres(grid: tuple[int, int]) -> Tensor:
    """Row and column of each patch's centre, in patches, `(rows · columns, 2)` float64."""
    axes = [torch.arange(length, dtype=torch.float64) + 0.5 for length in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


def counts(homography: Tensor, rule: ViewRule, grid: tuple[int, int]) -> bool:
    """Whether two views share enough, and what they share has moved far enough."""
    places, inside = true_places(homography, grid)
    moves = (places - patch_centres(grid)).abs().amax(dim=1)[inside]
    enough = len(moves) > 0 and float(inside.double().mean()) >= rule.least_overlap
    return enough and float(moves.mean()) >= rule.least_move and bool((moves > rule.least_move).any())


def _between(corners: np.ndarray, sides: np.ndarray, mirrored: bool) -> Tensor:
    """The map from the first of two crops to the second, `corners` and `sides` as `(2, xy)` in pixels."""
    scale, shift = sides[0] / sides[1], (corners[0] - corners[1]) / sides[1]
    if mirrored:
        scale[0], shift[0] = -scale[0], 1 - shift[0]
    return torch.tensor([[scale[0], 0, shift[0]], [0, scale[1], shift[1]], [0, 0, 1]], dtype=torch.float64)


def resized_view(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """A whole image as one view, `(3, H, W)` uint8."""
    return torch.from_numpy(np.array(image.resize(size[::-1], Image.Resampling.BICUBIC))).permute(2, 0, 1)
