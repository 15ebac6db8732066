"""The fast bilateral solver written down equation by equation, slowly: what ours is checked and timed against."""

import numpy as np
from scipy.sparse import csr_array, diags_array, eye_array
from scipy.sparse.linalg import cg

RGB_TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


def solve(image: np.ndarray, target: np.ndarray, steps: int = 25) -> np.ndarray:
    """Smooths a target `(H, W)` along an image `(H, W, 3)` of 8 bit (arXiv 1511.03296, algorithm 1)."""
    splat, blur = bilateral_grid(image)
    pixels = splat @ np.ones(target.size)
    scale = np.ones(len(pixels))
    for _ in range(10):
        scale = np.sqrt(scale * pixels / (blur @ scale))
    scaling, marginals = diags_array(scale), diags_array(scale * (blur @ scale))
    confidence = np.full(target.size, 0.999)
    system = 256 * (marginals - scaling @ blur @ scaling) + diags_array(splat @ confidence)
    right_side = splat @ (confidence * target.ravel())
    start, jacobi = right_side / (splat @ confidence), diags_array(1 / system.diagonal())
    vertices, _ = cg(system, right_side, x0=start, M=jacobi, rtol=1e-5, maxiter=steps)
    return (splat.T @ vertices).reshape(target.shape)


def bilateral_grid(image: np.ndarray) -> tuple[csr_array, csr_array]:
    """Splat `(vertices, pixels)` and blur `(vertices, vertices)`."""
    row, column = np.mgrid[: image.shape[0], : image.shape[1]]
    colours = np.tensordot(image, RGB_TO_YUV, ([2], [1])) + np.array([0, 128, 128])
    places = np.dstack([row / 16, column / 16, colours / np.array([16, 8, 8])]).astype(np.int64).reshape(-1, 5)
    spread = 1000 ** np.arange(5)
    keys, vertex_of_pixel = np.unique(places @ spread, return_inverse=True)
    count = len(vertex_of_pixel)
    splat = csr_array((np.ones(count), (vertex_of_pixel, np.arange(count))), shape=(len(keys), count))
    blur = 10 * eye_array(len(keys), format="csr")
    for step in (*spread, *-spread):
        beside = np.searchsorted(keys, keys + step).clip(max=len(keys) - 1)
        found = np.flatnonzero(keys[beside] == keys + step)
        blur = blur + csr_array((np.ones(len(found)), (found, beside[found])), shape=blur.shape)
    return splat, blur
