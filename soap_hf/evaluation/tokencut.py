"""TokenCut: the salient object of an image as one side of a normalised cut through its patch tokens."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..runtime.errors import MissingExtraError, SOAPError

try:
    from scipy.ndimage import label
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
except ImportError as error:
    raise MissingExtraError('TokenCut needs scipy; run pip install "soap-hf[eval]".') from error

TAU = 0.3
"""Cosine similarity above which two patches are linked."""

EPSILON = 1e-5
"""Weight between patches that are not linked; linked ones have 1."""

TOLERANCE = 1e-12
"""Of the eigenvector's residual."""

TIE = 1e-6
"""Relative difference of two entries of an eigenvector below which they are round-off apart."""


def token_cut(tokens: Tensor, *, tau: float = TAU, epsilon: float = EPSILON) -> np.ndarray | None:
    """The patches of the salient object: TokenCut (arXiv 2209.00383) up to its refinement.

    Patches are linked where the cosine similarity of their tokens exceeds `tau`. The eigenvector of the
    second-smallest eigenvalue of (D - W, D) parts them at its mean. The object is the side of the seed, which is the
    entry of largest magnitude, without what is not connected to the seed on the grid (over edges, not corners). Of
    patches with the same links, whose entries are equal, the first in raster order is the seed.

    Args:
        tokens (`torch.Tensor` of shape `(rows, columns, D)`): patch tokens, any floating dtype and device.
        tau (`float`, defaults to 0.3), epsilon (`float`, defaults to 1e-5): as above; `epsilon` links what `tau` does
            not.

    Returns:
        `np.ndarray` of shape `(rows, columns)`, bool; `None` if there is nothing to divide: all patches are linked to
        each other, as on an image of one colour, or none is.

    Raises:
        SOAPError: tokens of another number of axes, or `epsilon` outside (0, 1).

    Example:
        >>> import torch
        >>> tokens = torch.tensor([1.0, 0.0]).repeat(4, 4, 1)  # background
        >>> tokens[1:3, 1:3] = torch.tensor([0.0, 1.0])
        >>> token_cut(tokens).astype(int)
        array([[0, 0, 0, 0],
               [0, 1, 1, 0],
               [0, 1, 1, 0],
               [0, 0, 0, 0]])
    """
    if tokens.ndim != 3 or not 0 < epsilon < 1:
        raise SOAPError(
            f"TokenCut takes tokens of shape (rows, columns, D) and epsilon in (0, 1), not {tuple(tokens.shape)} and "
            f"{epsilon}."
        )
    vector = second_eigenvector(links(tokens, tau), epsilon)
    return None if vector is None else object_of(vector.reshape(tokens.shape[:2]))


def links(tokens: Tensor, tau: float = TAU) -> np.ndarray:
    """Which patches are linked, `(N, N)` bool; arguments as in `token_cut`."""
    directions = normalize(tokens.detach().flatten(0, 1).to(torch.float32), dim=-1)
    return (directions @ directions.T > tau).cpu().numpy()


def second_eigenvector(linked: np.ndarray, epsilon: float = EPSILON) -> np.ndarray | None:
    r"""The second-smallest eigenvector of $(D - W) x = \lambda D x$, for $W$ of 1 where linked and epsilon elsewhere.

    It is $D^{-1/2} y$, with $y$ the second-largest eigenvector of $D^{-1/2} W D^{-1/2}$. The largest is known,
    $D^{1/2} 1$, and its eigenvalue is made 0, which is less than the second (the trace says so). What is left to find
    is the largest eigenvector of a matrix, to which Lanczos iterations converge in a few dozen products.

    `linked` `(N, N)` bool is symmetric. The eigenvector `(N,)` is of either sign; it is `None` if it is not determined
    (all linked or none) or not found.
    """
    between = np.count_nonzero(linked) - np.count_nonzero(linked.diagonal())
    if between in (0, len(linked) * (len(linked) - 1)):
        return None
    weights = np.where(linked, 1.0, epsilon)
    root = np.sqrt(weights.sum(axis=1))
    weights /= root[:, None]
    weights /= root
    first = root / np.linalg.norm(root)
    deflated = LinearOperator(weights.shape, matvec=lambda x: weights @ x - first * (first @ x), dtype=weights.dtype)
    start = np.random.default_rng(0).standard_normal(len(root))
    try:
        _, vectors = eigsh(deflated, k=1, which="LA", v0=start, tol=TOLERANCE)
    except ArpackError:
        return None
    return vectors[:, 0] / root


def object_of(vector: np.ndarray) -> np.ndarray:
    """The object in an eigenvector on its grid `(rows, columns)`, as in `token_cut`; bool."""
    magnitudes = np.abs(vector)
    seed = np.unravel_index(np.argmax(magnitudes >= (1 - TIE) * magnitudes.max()), vector.shape)
    above = vector > vector.mean()
    components, _ = label(above == above[seed])
    return components == components[seed]
