"""Semantic-invariance scores and suppression weights: pure functions of tensors.

Source: "Suppressing Non-Semantic Noise in Masked Image Modeling Representations" (SOAP), arXiv 2604.00172. Where its
project page and its released code differ, the code is followed, since it made the paper's numbers: the score is taken
at each position and then averaged, and the window of the weights is `sigmoid((mu - 0.5 - rank) / tau)`.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from ..runtime.errors import SOAPError

Mu = float | Literal["auto"]
"""How many components to remove, or as many as score above a threshold."""


def semantic_invariance(p: Tensor, q: Tensor, *, alpha: float = 2.0, gamma: float = 1.0) -> Tensor:
    r"""Semantic invariance of every component, averaged over positions (arXiv 2604.00172).

    $s_{n,d} = 2\,(pq + (1-p)(1-q))^\gamma \,/\, (\lVert(p, 1-p)\rVert_\alpha + \lVert(q, 1-q)\rVert_\alpha)$

    A component scores 1 if its responses have one sign on every real and every synthetic image at each position, and
    0.7071 if their signs are coin flips.

    Args:
        p, q (`torch.Tensor` of shape `(*grid, D)`): share of real and of synthetic images with a positive response.
        alpha (`float`, defaults to 2.0): order of the norms, at least 1.
        gamma (`float`, defaults to 1.0): exponent of the agreement, at least 1 (below, scores could exceed 1).

    Returns:
        `torch.Tensor` of shape `(D,)`, in [0, 1], dtype of the inputs.

    Raises:
        SOAPError: shapes differ, or `alpha` or `gamma` is out of range.

    Example:
        >>> import torch
        >>> left_right = torch.tensor([[1.0], [0.0]])  # positive on the left, negative on the right, on all images
        >>> semantic_invariance(left_right, left_right)
        tensor([1.])
    """
    if p.shape != q.shape:
        raise SOAPError(
            f"Real and synthetic responses must share one grid, but have shapes {tuple(p.shape)} and {tuple(q.shape)}."
        )
    if not (alpha >= 1 and gamma >= 1):
        raise SOAPError(f"alpha and gamma must be at least 1, not alpha={alpha} and gamma={gamma}.")
    agreement = p * q + (1 - p) * (1 - q)
    norms = sum(torch.linalg.vector_norm(torch.stack((r, 1 - r)), ord=alpha, dim=0) for r in (p, q))
    scores = 2 * agreement**gamma / norms
    return scores.reshape(-1, scores.shape[-1]).mean(dim=0)


def suppression_weights(scores: Tensor, *, mu: Mu = "auto", tau: float = 0.05, threshold: float = 0.75) -> Tensor:
    r"""How much of every component is removed.

    $w_d = s_d\,\sigma((\mu - 0.5 - r_d) / \tau)$ with $r_d = 0, 1, \dots$ the rank of $s_d$ in decreasing order
    (arXiv 2604.00172, as in the released code): the `mu` highest-scoring components are removed up to `1 - s_d` of
    their amplitude, the others stay.

    Args:
        scores (`torch.Tensor` of shape `(D,)`): semantic invariance of every component, in any order.
        mu (`float` or `"auto"`, defaults to `"auto"`): how many components to remove; `"auto"` counts the scores above
            `threshold`. `mu <= 0` removes nothing.
        tau (`float`, defaults to 0.05): softness of the cut, above 0.
        threshold (`float`, defaults to 0.75): what `"auto"` counts as semantically invariant.

    Returns:
        `torch.Tensor` of shape `(D,)`, in [0, 1], order and dtype of `scores`.

    Raises:
        SOAPError: `tau` is not above 0, or `mu`, `threshold` or a score is not finite.

    Example:
        >>> import torch
        >>> suppression_weights(torch.tensor([0.70, 0.96, 0.84])).round(decimals=3)
        tensor([0.0000, 0.9600, 0.8400])
    """
    if not tau > 0:
        raise SOAPError(f"tau must be above 0, not {tau}.")
    if not math.isfinite(threshold):
        raise SOAPError(f"threshold must be a finite number, not {threshold}.")
    if not torch.isfinite(scores).all():
        raise SOAPError("Scores must be finite, but some are NaN or Inf.")
    if mu != "auto" and (isinstance(mu, str) or not math.isfinite(mu)):
        raise SOAPError(f'mu must be a finite number or "auto", not {mu!r}.')
    count = float((scores > threshold).sum()) if mu == "auto" else float(mu)
    if not count > 0:
        return torch.zeros_like(scores)
    order = torch.argsort(scores, descending=True, stable=True)
    ranks = torch.empty_like(scores)
    ranks[order] = torch.arange(len(scores), dtype=scores.dtype, device=scores.device)
    return scores * torch.sigmoid((count - 0.5 - ranks) / tau)
