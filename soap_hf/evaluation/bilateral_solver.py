"""The fast bilateral solver: smooths a map within regions of one colour, and keeps its edges where the image has some.

Barron and Poole, *The Fast Bilateral Solver*, ECCV 2016, arXiv 1511.03296, on the simplified bilateral grid of their
appendix. Numbers of equations below are theirs.
"""

import numpy as np

from ..runtime.errors import MissingExtraError, SOAPError

try:
    from pandas import factorize
    from scipy.ndimage import binary_fill_holes, label
    from scipy.sparse import coo_array, csr_array, diags_array
    from scipy.sparse.linalg import cg
except ImportError as error:
    raise MissingExtraError('The bilateral solver needs scipy and pandas; run pip install "soap-hf[eval]".') from error

YUV_FROM_RGB = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
"""JPEG's; the two chroma channels are then shifted by 128."""

SIGMA_SPATIAL, SIGMA_LUMA, SIGMA_CHROMA = 16, 16, 8
"""Width of a cell of the grid: pixels, and levels of the two kinds of channels."""

SMOOTHNESS = 256.0
CONFIDENCE = 0.999
"""Weights of smoothness (lambda, equation 1) and of each pixel of the target."""

BISTOCHASTISATION_STEPS = 10
SOLVER_STEPS = 25
SOLVER_TOLERANCE = 1e-5


class BilateralGrid:
    """The bilateral grid of one image: pixels near in place and colour share a vertex.

    Made once an image, then `refine` smooths as many maps as needed.

    Args:
        image (`np.ndarray` of shape `(H, W, 3)`, uint8): RGB.

    Raises:
        SOAPError: another shape or dtype.

    Example:
        >>> image = np.zeros((32, 64, 3), np.uint8)
        >>> image[:, 40:] = 255  # two regions
        >>> target = np.zeros((32, 64))
        >>> target[:, 32:] = 1  # an edge that is 8 pixels off
        >>> refined = BilateralGrid(image).refine(target) > 0.5
        >>> refined[:, :40].any(), refined[:, 40:].all()
        (np.False_, np.True_)
    """

    def __init__(self, image: np.ndarray):
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8 or not image.size:
            raise SOAPError(
                f"A bilateral grid is made from an image of shape (H, W, 3) in uint8, not {image.shape} in "
                f"{image.dtype}."
            )
        self.shape = image.shape[:2]
        keys, steps = _cells(image)
        self._vertex_of_pixel, vertices = factorize(keys, sort=True)
        self._pixels = np.bincount(self._vertex_of_pixel).astype(np.float64)
        self._system = _system(_blur(vertices, steps), self._pixels)

    def refine(self, target: np.ndarray) -> np.ndarray:
        """A map that is smooth where the image is and near to the target (equation 8).

        Args:
            target (`np.ndarray` of shape `(H, W)`): bool or floating, of the size of the image.

        Returns:
            `np.ndarray` of shape `(H, W)`, float64: about the range of the target.

        Raises:
            SOAPError: another size.
        """
        if target.shape != self.shape:
            raise SOAPError(f"The target has shape {target.shape}, but the image {self.shape}; resize one of them.")
        splatted = np.bincount(self._vertex_of_pixel, weights=target.ravel(), minlength=len(self._pixels))
        solution, _ = cg(  # what its last step has reached counts
            self._system,
            CONFIDENCE * splatted,
            x0=splatted / self._pixels,
            M=diags_array(1 / self._system.diagonal()),
            rtol=SOLVER_TOLERANCE,
            maxiter=SOLVER_STEPS,
        )
        return solution[self._vertex_of_pixel].reshape(self.shape)


def largest_region(mask: np.ndarray) -> np.ndarray:
    """The largest connected region of a mask `(H, W)`, over edges and not corners, with its holes filled; bool.

    Example:
        >>> largest_region(np.array([[1, 1, 0, 1], [1, 1, 0, 0]]) > 0).astype(int)
        array([[1, 1, 0, 0],
               [1, 1, 0, 0]])
    """
    regions, count = label(binary_fill_holes(mask))
    sizes = np.bincount(regions.ravel(), minlength=2)
    return regions == 1 + np.argmax(sizes[1:]) if count else np.zeros(mask.shape, bool)


def _cells(image: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The cell of each pixel as one number, `(H * W,)` int64, and how far two neighbours are apart along each axis."""
    widths = np.array([[SIGMA_LUMA], [SIGMA_CHROMA], [SIGMA_CHROMA]])
    luma, *chroma = (YUV_FROM_RGB / widths) @ image.reshape(-1, 3).T.astype(np.float64)
    row, column = (np.arange(length) // SIGMA_SPATIAL for length in image.shape[:2])
    coordinates = [
        np.repeat(row, len(column)),
        np.tile(column, len(row)),
        luma.astype(np.int64),
        *((channel + 128 / SIGMA_CHROMA).astype(np.int64) for channel in chroma),
    ]
    keys, steps = np.zeros(len(luma), np.int64), [1]
    for axis in reversed(coordinates):
        keys += steps[-1] * axis
        steps.append(steps[-1] * (int(axis.max()) + 2))  # one free cell, so that the last has no false neighbour
    return keys, steps[:-1]


def _blur(vertices: np.ndarray, steps: list[int]) -> csr_array:
    """The blur of the grid: along each of its axes (1, 2, 1), summed."""
    pairs = []
    for step in steps:  # vertices that have a neighbour one step on, and those neighbours
        places = np.searchsorted(vertices, vertices + step)
        places[places == len(vertices)] = 0
        found = np.flatnonzero(vertices[places] == vertices + step)
        pairs.append((found, places[found]))
    first, second = (np.concatenate(part) for part in zip(*pairs, strict=True))
    here = np.arange(len(vertices))
    weights = np.repeat([1.0, 2.0 * len(steps)], [2 * len(first), len(here)])
    rows, columns = np.concatenate((first, second, here)), np.concatenate((second, first, here))
    return coo_array((weights, (rows, columns)), shape=2 * (len(here),)).tocsr()


def _system(blur: csr_array, pixels: np.ndarray) -> csr_array:
    """The matrix of the linear system: smoothness, from the bistochastised blur, and confidence in the target."""
    scale = np.ones(len(pixels))
    for _ in range(BISTOCHASTISATION_STEPS):
        scale = np.sqrt(scale * pixels / (blur @ scale))
    marginals = scale * (blur @ scale)
    row_scale = np.repeat(scale, np.diff(blur.indptr))
    smoothness = -SMOOTHNESS * row_scale * blur.data * scale[blur.indices]
    system = csr_array((smoothness, blur.indices, blur.indptr), blur.shape)
    system.setdiag(system.diagonal() + SMOOTHNESS * marginals + CONFIDENCE * pixels)
    return system
