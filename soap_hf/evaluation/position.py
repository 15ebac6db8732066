"""How much of the patch tokens a position explains."""

from torch import Tensor

from ..errors import SOAPError


def position_variance_share(tokens: Tensor, raw: Tensor | None = None) -> float:
    r"""Share of the variance of the raw patch tokens that their position alone explains.

    $\sum_n \lVert \bar z_n - m \rVert^2 \,/\, \frac{1}{N} \sum_i \sum_n \lVert z^{raw}_{i,n} - m^{raw} \rVert^2$, with
    $\bar z_n$ the mean over images at position $n$ and $m$ the mean over images and positions. Tokens that know
    nothing of their position give about $1/N$.

    Args:
        tokens (`torch.Tensor` of shape `(N, *grid, D)`): patch tokens of images, raw or clean.
        raw (`torch.Tensor` of shape `(N, *grid, D)`, *optional*): the raw tokens of the same images, if `tokens` are
            clean: both are then measured against one total.

    Raises:
        SOAPError: shapes differ, or the raw tokens do not vary.

    Example:
        >>> import torch
        >>> position_variance_share(torch.tensor([[[1.0], [-1.0]]]).repeat(5, 1, 1))
        1.0
    """
    raw = tokens if raw is None else raw
    if raw.shape != tokens.shape:
        raise SOAPError(f"Clean and raw tokens must have one shape, not {tuple(tokens.shape)} and {tuple(raw.shape)}.")
    centred = _centred(raw)
    total = centred.square().sum() / len(raw)
    if not total > 0:
        raise SOAPError("The raw patch tokens do not vary, so position cannot explain any of it.")
    by_position = _centred(tokens).mean(dim=0)
    return float(by_position.square().sum() / total)


def _centred(tokens: Tensor) -> Tensor:
    rows = tokens.detach().double().flatten(1, -2)
    return rows - rows.mean(dim=(0, 1))
