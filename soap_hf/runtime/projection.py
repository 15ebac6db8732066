"""The projection: the identity minus a low-rank map, in float32 whatever the backbone's dtype."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import HeadError


class SOAPProjection(nn.Module):
    r"""Removes directions from patch tokens: $z \mapsto z - ((z V) \odot w) V^\top$, with $V$ orthonormal.

    The projector $P_\phi$ of the paper (arXiv 2604.00172), applied as two skinny products; tokens are not centred.
    Buffers stay float32 through `.half()`, `.to(torch.bfloat16)` and autocast, products run in float32 (float64 for
    float64 tokens), and the result has the dtype of the tokens. Nothing is trained; gradients flow through the tokens.

    Args:
        basis (`torch.Tensor` of shape `(D, k)`): orthonormal columns, the directions to remove.
        weights (`torch.Tensor` of shape `(k,)`): how much of each is removed, in [0, 1].

    Raises:
        HeadError: shapes do not fit, a value is not finite, a weight is outside [0, 1], or the columns of `basis` are
            not orthonormal (to 1e-3).

    Example:
        >>> import torch
        >>> projection = SOAPProjection(torch.tensor([[1.0], [0.0]]), torch.tensor([0.9]))
        >>> projection(torch.tensor([[10.0, 5.0]]))
        tensor([[1., 5.]])
        >>> projection.matrix()
        tensor([[0.1000, 0.0000],
                [0.0000, 1.0000]])
    """

    basis: Tensor
    weights: Tensor

    def __init__(self, basis: Tensor, weights: Tensor):
        super().__init__()
        _check_projection(basis, weights)
        self.register_buffer("basis", basis.detach().to(torch.float32).contiguous())
        self.register_buffer("weights", weights.detach().to(torch.float32).contiguous())

    @classmethod
    def identity(cls, dim: int) -> "SOAPProjection":
        """The projection that removes nothing from tokens of width `dim`."""
        return cls(torch.zeros(dim, 0), torch.zeros(0))

    @property
    def dim(self) -> int:
        """Width `D` of the tokens."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """Number `k` of directions removed."""
        return self.basis.shape[1]

    def forward(self, tokens: Tensor) -> Tensor:
        """Removes the directions from tokens `(..., D)` of any floating dtype; with `k = 0` it gives them back.

        Raises:
            HeadError: tokens of another width.
        """
        if tokens.shape[-1] != self.dim:
            raise HeadError(
                f"This head removes directions from tokens of width {self.dim}, but got tokens of width "
                f"{tokens.shape[-1]}: it was fitted on another backbone or layer."
            )
        if self.rank == 0:
            return tokens
        with torch.autocast(tokens.device.type, enabled=False):
            rows = tokens.reshape(-1, self.dim).to(torch.promote_types(tokens.dtype, torch.float32))
            # directions in rows: a product with a contiguous (k, D) is several times faster than with (D, k) on CPU
            directions = self.basis.T.to(rows.device, rows.dtype).contiguous()
            amplitudes = nn.functional.linear(rows, directions) * self.weights.to(rows.device, rows.dtype)
            clean = torch.addmm(rows, amplitudes, directions, alpha=-1)
        return clean.to(tokens.dtype).view(tokens.shape)

    def matrix(self) -> Tensor:
        """The dense `(D, D)` float32 projector, for tests and for reading; `forward` never makes it."""
        return torch.eye(self.dim, device=self.basis.device) - (self.basis * self.weights) @ self.basis.T

    def to_linear(self) -> nn.Linear:
        """A plain frozen `nn.Linear(D, D, bias=False)` that does the same; half precision rounds it."""
        linear = nn.Linear(self.dim, self.dim, bias=False, device=self.basis.device)
        linear.weight = nn.Parameter(self.matrix(), requires_grad=False)
        return linear

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SOAPProjection":
        # .half() and .to(bfloat16) move this module, but never round it
        exact: dict[str, Any] = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"dim={self.dim}, rank={self.rank}"


def _check_projection(basis: Tensor, weights: Tensor) -> None:
    if basis.ndim != 2 or weights.ndim != 1 or basis.shape[1] != len(weights) or basis.shape[0] < basis.shape[1]:
        raise HeadError(
            f"A projection takes a basis of shape (D, k) and weights of shape (k,) with k <= D, not "
            f"{tuple(basis.shape)} and {tuple(weights.shape)}."
        )
    if basis.is_meta or weights.is_meta:
        return
    if not (torch.isfinite(basis).all() and torch.isfinite(weights).all()):
        raise HeadError("The projection holds NaN or Inf; fetch or fit the head again.")
    if len(weights) and not (weights.min() >= 0 and weights.max() <= 1):
        raise HeadError(f"Projection weights must lie in [0, 1], but span {weights.min():g} to {weights.max():g}.")
    basis = basis.detach().cpu().to(torch.float64)  # not every accelerator has float64
    gram = basis.T @ basis
    if not torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype, device=gram.device), atol=1e-3):
        raise HeadError("The columns of the projection's basis are not orthonormal; fetch or fit the head again.")
