"""How much of the patch tokens a position explains."""

from typing import Any

import torch
from torch import Tensor

from ..runtime.errors import SOAPError
from ..statistics.token_statistics import TokenMoments
from .comparison import Comparison
from .examples import Examples, short_names
from .results import Results

RIDGE = 1.0
"""Strength of the probe's ridge, in mean variances of the raw tokens: what it finds must stand out that far."""


def evaluate_position(
    comparison: Comparison,
    images: Examples,
    *,
    ridge: float = RIDGE,
    batch_size: int = 32,
    progress: bool = True,
    command: str | None = None,
) -> Results:
    """How much of the raw and of the clean patch tokens a position explains, on images of one forward pass each.

    `share` is `position_variance_share`, `row_r2` and `column_r2` are those of `position_probe`. All tokens are held
    in memory, in float32.

    Args:
        comparison ([`Comparison`]): the head and its methods.
        images ([`Examples`]): images that the head was not fitted on.
        ridge (`float`, defaults to 1.0): as in `position_probe`.
        batch_size (`int`, defaults to 32): images in a forward pass.
        progress (`bool`, defaults to `True`): show bars.
        command (`str`, *optional*): noted in the summary.

    Returns:
        [`Results`]: one row per image, whose `<method>_share` is what `position_shares` gives; the means over images
        are the values for all images.

    Raises:
        SOAPError: `ridge` is not positive, the grid is a single row or column, or the raw tokens do not vary.

    Example:
        >>> from datasets import Dataset
        >>> from PIL import Image
        >>> from transformers import ViTConfig, ViTModel
        >>> from soap_hf import SOAPModelWrapper
        >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        ...                          image_size=32, patch_size=8))
        >>> images = Dataset.from_dict({"image": [Image.new("RGB", (32, 32), (40 * i, 0, 0)) for i in range(6)]})
        >>> comparison = Comparison.of(SOAPModelWrapper.from_backbone(vit, None))
        >>> found = evaluate_position(comparison, Examples(images), progress=False)
        >>> list(found.rows[0])[:4]
        ['image', 'raw_share', 'raw_row_r2', 'raw_column_r2']
    """
    _refuse_bad_ridge(ridge)
    options: dict[str, Any] = {"phase": "images", "progress": progress}
    parts = comparison.measured(images, lambda tokens: tokens.patches.cpu().clone(), batch_size, **options)
    raw = torch.cat([part.value for part in parts])
    rows: list[dict[str, Any]] = [{"image": name} for name in short_names([n for part in parts for n in part.names])]
    for name, projection in comparison.methods.items():
        tokens = projection(raw)
        shares, r2 = position_shares(tokens, raw), position_probe(tokens, raw, ridge=ridge)
        for row, share, (row_r2, column_r2) in zip(rows, shares.tolist(), r2.tolist(), strict=True):
            row |= {f"{name}_share": share, f"{name}_row_r2": row_r2, f"{name}_column_r2": column_r2}
    metrics = ("share", "row_r2", "column_r2")
    counts = {"images": len(rows), "positions": raw[0, ..., 0].numel(), "bad_images": len(images.bad_images)}
    return comparison.results("position", rows, metrics, counts=counts, command=command, ridge=ridge)


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
    return float(position_shares(tokens, tokens if raw is None else raw).mean())


def position_shares(tokens: Tensor, raw: Tensor) -> Tensor:
    """What each image contributes to the share of variance that position explains: a pseudo-value.

    The mean over images is `position_variance_share`, and the spread of the values gives its sampling error: an image
    counts in the means of the positions as well as in the total (its influence, Efron & Tibshirani 1993, chapter 21).

    Args:
        tokens, raw (`torch.Tensor` of shape `(N, *grid, D)`): clean and raw tokens of the same images.

    Returns:
        `torch.Tensor` of shape `(N,)`, float64.

    Raises:
        SOAPError: shapes differ, or the raw tokens do not vary.
    """
    if raw.shape != tokens.shape:
        raise SOAPError(f"Clean and raw tokens must have one shape, not {tuple(tokens.shape)} and {tuple(raw.shape)}.")
    rows, raw_rows = tokens.detach().flatten(1, -2), raw.detach().flatten(1, -2)
    origin = raw_rows.mean(dim=(0, 1), dtype=torch.float64)
    totals = torch.stack([(image - origin).square().sum() for image in raw_rows])
    if not totals.mean() > 0:
        raise SOAPError("The raw patch tokens do not vary, so position cannot explain any of it.")
    by_position = _by_position(rows)
    explained = torch.stack([(image * by_position).sum() for image in rows])  # on average |by_position|²
    share = by_position.square().sum() / totals.mean()
    return share + (2 * (explained - explained.mean()) - share * (totals - totals.mean())) / totals.mean()


def position_probe(tokens: Tensor, raw: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """R² with which a linear probe tells row and column of patch tokens, for each image while it is held out.

    Two probes, each fitted on every other image and measured on the rest. What a head has only scaled down (by one
    minus the score) a probe without a ridge would scale up again: the ridge is a multiple of the mean variance of the
    *raw* tokens along a direction, so that it is the same for every method.

    Args:
        tokens, raw (`torch.Tensor` of shape `(N, *grid, D)`): clean and raw tokens of the same images; the last two
            axes of the grid are rows and columns.
        ridge (`float`, defaults to 1.0): a direction of variance `v` counts with `v / (v + ridge * mean variance)`.

    Returns:
        `torch.Tensor` of shape `(N, 2)`, float64: R² for rows and for columns.

    Raises:
        SOAPError: `ridge` is not positive, there are fewer than 2 images, or the grid is one row or column.
    """
    _refuse_bad_ridge(ridge)
    if len(raw) < 2 or raw.ndim < 4 or min(raw.shape[-3:-1]) < 2:
        raise SOAPError(
            f"A probe of position needs 2 images and a grid of 2 x 2 patches or more, not {tuple(raw.shape[:-1])}."
        )
    axes = [torch.arange(length, dtype=torch.float64) - (length - 1) / 2 for length in raw.shape[1:-1]]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij")[-2:], dim=-1).flatten(0, -2)  # (positions, 2), centred
    rows, raw_rows = tokens.detach().flatten(1, -2), raw.detach().flatten(1, -2)
    r2 = torch.empty(len(rows), 2, dtype=torch.float64)
    for held_out in (0, 1):
        fitted = rows[1 - held_out :: 2]
        moments = TokenMoments(rows.shape[-1]).update(fitted)
        raw_variance = TokenMoments(rows.shape[-1]).update(raw_rows[1 - held_out :: 2]).covariance().diagonal().mean()
        covariance = moments.covariance() + ridge * raw_variance * torch.eye(rows.shape[-1], dtype=torch.float64)
        probe = torch.linalg.solve(covariance, _by_position(fitted).T @ places / len(places))
        guessed = torch.stack([(image - moments.mean) @ probe for image in rows[held_out::2]])
        r2[held_out::2] = 1 - (guessed - places).square().sum(dim=1) / places.square().sum(dim=0)
    return r2


def _refuse_bad_ridge(ridge: float) -> None:
    if not ridge > 0:
        raise SOAPError(f"The ridge of a probe must be positive, not {ridge}.")


def _by_position(rows: Tensor) -> Tensor:
    """Mean over images at each position less the mean over all, `(positions, D)` float64."""
    means = rows.mean(dim=0, dtype=torch.float64)
    return means - means.mean(dim=0)
