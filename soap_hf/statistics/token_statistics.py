"""Streaming statistics of patch tokens: what one pass over the images adds up.

Two accumulators, filled batch by batch, saved and loaded as tensors: `TokenMoments` and `ResponseCounts`.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.errors import SOAPError
from ..runtime.patch_layout import check_finite

ROW_BLOCK = 8192
"""Rows worked off at a time, so that the working copy of a batch of tokens stays bounded."""

JACKKNIFE_GROUPS = 10
"""Images are dealt to this many groups, whose spread gives the standard error of a score."""


class PrincipalComponents(NamedTuple):
    """Principal components of patch tokens, in order of decreasing variance, all float64.

    `mean` (D,), `eigenvalues` (D,), `components` (D, D) in columns, the entry of largest magnitude positive, and
    `resolved` (D,) bool: whether the component's variance stands above float32 round-off.
    """

    mean: Tensor
    eigenvalues: Tensor
    components: Tensor
    resolved: Tensor


class TokenMoments:
    """Mean and covariance of patch tokens of width `dim`, by blocks of rows that Chan's merge adds up in float64.

    Args:
        products (`torch.dtype`, defaults to float64): of the products inside a block of rows centred on its own mean.
            In float32 the covariance is off by less than 1e-6 of its largest entry, and differs so between chunkings.

    Example:
        >>> import torch
        >>> tokens = torch.randn(8, 4, 4, 6, generator=torch.Generator().manual_seed(0))
        >>> whole = TokenMoments(6).update(tokens)
        >>> halves = TokenMoments(6).update(tokens[:3]).update(tokens[3:])
        >>> torch.allclose(whole.covariance(), halves.covariance(), rtol=1e-9)
        True
    """

    def __init__(self, dim: int, device: str | torch.device = "cpu", products: torch.dtype = torch.float64):
        self.count = 0
        self.products = products
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, tokens: Tensor, *, checked: bool = False) -> "TokenMoments":
        """Adds tokens of shape `(..., D)`, any floating dtype; returns itself. `checked`: they are known to be finite.

        Raises:
            NonFiniteTokensError: a token holds NaN or Inf; nothing of this call is added.
        """
        if not checked:
            check_finite(tokens)
        for rows in _blocks(tokens, self.products) if tokens.numel() else ():
            centre = rows.mean(dim=0)
            centred = rows - centre
            drift = centred.mean(dim=0, dtype=torch.float64)  # of the rounded centre from the mean
            count, delta = self.count + len(rows), centre.double() + drift - self.mean
            scatter = _product(centred.T, centred).double()
            self.scatter += scatter + torch.outer(delta, delta) * (self.count * len(rows) / count)
            self.mean += delta * (len(rows) / count)
            self.count = count
        return self

    def tensors(self) -> dict[str, Tensor]:
        """What `load` takes, to be saved."""
        return {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}

    def load(self, tensors: Mapping[str, Tensor]) -> "TokenMoments":
        """Takes the place of what was added so far; returns itself."""
        self.count = int(tensors["count"])
        self.mean, self.scatter = (tensors[name].to(self.mean.device) for name in ("mean", "scatter"))
        return self

    def covariance(self) -> Tensor:
        """Unbiased covariance, `(D, D)` float64; a `SOAPError` if fewer than two tokens were added."""
        if self.count < 2:
            raise SOAPError(f"A covariance needs at least 2 patch tokens, but only {self.count} were seen.")
        return self.scatter / (self.count - 1)

    def principal_components(self) -> PrincipalComponents:
        """Eigenvectors of the covariance; a `SOAPError` if fewer than two tokens were added, or they are all equal."""
        eigenvalues, components = torch.linalg.eigh(self.covariance())
        eigenvalues, components = eigenvalues.flip(0).clamp_min(0), components.flip(1)
        if not eigenvalues[0] > (4 * torch.finfo(torch.float64).eps * self.mean.abs().max()) ** 2:
            raise SOAPError("All patch tokens are equal: the backbone does not look at the images.")
        largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
        components = components * torch.where(largest < 0, -1.0, 1.0)
        resolved = eigenvalues > len(eigenvalues) * torch.finfo(torch.float32).eps ** 2 * eigenvalues[0]
        return PrincipalComponents(self.mean.clone(), eigenvalues, components, resolved)


class ResponseCounts:
    r"""How many images have a positive response, per component and position.

    The response of component $d$ at position $n$ is $1[(z_n - m) \cdot v_d > 0]$ (arXiv 2604.00172). Components
    without variance above round-off have no response: their counts stay 0.

    Args:
        principal (`PrincipalComponents`): of the real images' tokens, whose positions form `grid`.
        products (`torch.dtype`, defaults to float64): of the responses. In float32 those within 1e-6 of a token's
            length around 0 may come out with the other sign.
    """

    def __init__(self, principal: PrincipalComponents, grid: tuple[int, ...], products: torch.dtype = torch.float64):
        self.principal = principal
        self.grid = tuple(grid)
        self.products = products
        dim, device = len(principal.mean), principal.mean.device
        self.positive = torch.zeros(JACKKNIFE_GROUPS, *self.grid, dim, dtype=torch.int64, device=device)
        self.images = torch.zeros(JACKKNIFE_GROUPS, dtype=torch.int64)

    @property
    def num_images(self) -> int:
        """Images seen so far."""
        return int(self.images.sum())

    @torch.no_grad()
    def update(self, tokens: Tensor, *, checked: bool = False) -> "ResponseCounts":
        """Adds the tokens of images, `(B, *grid, D)`, any floating dtype; `checked` as in [`TokenMoments`].

        Raises:
            SOAPError: tokens on another grid.
            NonFiniteTokensError: a token holds NaN or Inf; nothing of this call is added.
        """
        if tokens.shape[1:-1] != self.grid:
            raise SOAPError(
                f"All images of a fit must share one grid: expected {self.grid}, got {tuple(tokens.shape[1:-1])}."
            )
        if not checked:
            check_finite(tokens)
        mean, components = (part.to(self.products) for part in (self.principal.mean, self.principal.components))
        positive = torch.cat([_product(rows - mean, components) > 0 for rows in _blocks(tokens, self.products)])
        positive = (positive & self.principal.resolved).view(tokens.shape)
        first = self.num_images
        for group in range(JACKKNIFE_GROUPS):
            share = positive[(group - first) % JACKKNIFE_GROUPS :: JACKKNIFE_GROUPS]
            self.positive[group] += share.sum(dim=0)
            self.images[group] += len(share)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """What `load` takes, to be saved beside the principal components."""
        return {"positive": self.positive, "images": self.images}

    def load(self, tensors: Mapping[str, Tensor]) -> "ResponseCounts":
        """Takes the place of what was added so far; returns itself."""
        self.positive, self.images = tensors["positive"].to(self.positive.device), tensors["images"]
        return self

    def response(self) -> Tensor:
        """Share of images with a positive response, `(*grid, D)` float64; a `SOAPError` if no image was added."""
        if self.num_images == 0:
            raise SOAPError("Responses need at least one image, but none was seen.")
        return self.positive.sum(dim=0).double() / self.num_images

    def leave_one_group_out(self) -> Iterator[Tensor]:
        """`response()` without the images of one group, for each group that holds some but not all images."""
        total, num_images = self.positive.sum(dim=0), self.num_images
        for positive, images in zip(self.positive, self.images.tolist(), strict=True):
            if 0 < images < num_images:
                yield (total - positive).double() / (num_images - images)


def _blocks(tokens: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    return (rows.to(dtype) for rows in tokens.reshape(-1, tokens.shape[-1]).split(ROW_BLOCK))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product that keeps all bits of float32, whatever the user's setting for TensorFloat-32."""
    setting = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return left @ right
    finally:
        torch.set_float32_matmul_precision(setting)
