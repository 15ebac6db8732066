"""What a fit learns: components, responses and scores of a backbone's patch tokens, saved as one safetensors file."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..files import write_tensors
from ..notebooks import html_of
from ..runtime.errors import HeadError, SOAPError
from ..runtime.head_files import read_tensors
from ..runtime.projection import SOAPProjection
from . import NEGLIGIBLE_WEIGHT
from .components import component_table
from .semantic_invariance import Mu, semantic_invariance, suppression_weights
from .token_statistics import ResponseCounts, TokenMoments

STORED_COMPONENTS = 64
"""Vectors and response maps of this many components, those with the highest scores, are saved."""

LEADING_COMPONENTS = 16
"""… and those of this many components of largest variance, to compare with."""

_COUNTS = ("num_real", "num_synthetic")


@dataclass(frozen=True, repr=False)
class SOAPStatistics:
    """Components, responses and scores of a backbone's patch tokens (arXiv 2604.00172).

    Attributes:
        mean (`(D,)` float64): mean patch token over the real images.
        eigenvalues (`(D,)` float64): variance of every component, decreasing; a component's number is its place here.
        scores (`(D,)` float64): semantic invariance of every component; 0 where the variance is mere round-off.
        standard_errors (`(D,)` float64): sampling error of the scores for the given components, by a jackknife over
            groups of images.
        component_indices (`(K,)` int64): numbers of the components below; all `D` after a fit, after loading the 64
            with the highest scores and the 16 of largest variance.
        components (`(D, K)` float64, float32 after loading): components in columns; the entry of largest magnitude is
            positive.
        real_response, synthetic_response (`(*grid, K)`, as `components`): share of images with a positive response.
        num_real, num_synthetic (`int`): images of each kind.
    """

    mean: Tensor
    eigenvalues: Tensor
    scores: Tensor
    standard_errors: Tensor
    component_indices: Tensor
    components: Tensor
    real_response: Tensor
    synthetic_response: Tensor
    num_real: int
    num_synthetic: int

    def __repr__(self) -> str:
        held, grid = len(self.component_indices), " x ".join(map(str, self.real_response.shape[:-1]))
        which = f"{len(self.scores)} components" + (f", vectors of {held}" if held < len(self.scores) else "")
        images = f"{self.num_real} real and {self.num_synthetic} synthetic images"
        return f"SOAPStatistics({which}, {grid} patches, {images}, top score {float(self.scores.max()):.3f})"

    def _repr_html_(self) -> str:
        return html_of(repr(self), component_table(self.table()))

    @classmethod
    def from_tokens(cls, real: Tensor, synthetic: Tensor) -> "SOAPStatistics":
        """Statistics of patch tokens that are at hand.

        Args:
            real, synthetic (`torch.Tensor` of shape `(N, *grid, D)`): patch tokens of real and of synthetic images,
                any floating dtype; the two may differ in `N`.

        Raises:
            SOAPError: shapes do not fit, or there are too few tokens.
            NonFiniteTokensError: a token holds NaN or Inf.

        Example:
            >>> import torch
            >>> generator = torch.Generator().manual_seed(0)
            >>> real, synthetic = torch.randn(2, 64, 2, 2, 8, generator=generator)
            >>> side = torch.tensor([[-3.0, 3.0], [-3.0, 3.0]])  # a direction that says left or right
            >>> real[..., 0] += side; synthetic[..., 0] += side
            >>> SOAPStatistics.from_tokens(real, synthetic).projection().rank
            1
        """
        if real.ndim < 3 or real.shape[1:] != synthetic.shape[1:] or not len(real) or not len(synthetic):
            raise SOAPError(
                "Real and synthetic tokens must both have shape (N, *grid, D) with one grid and D, not "
                f"{tuple(real.shape)} and {tuple(synthetic.shape)}."
            )
        principal = TokenMoments(real.shape[-1], real.device).update(real).principal_components()
        counts = (ResponseCounts(principal, tuple(real.shape[1:-1])).update(tokens) for tokens in (real, synthetic))
        return cls.from_counts(*counts)

    @classmethod
    def from_counts(cls, real: ResponseCounts, synthetic: ResponseCounts) -> "SOAPStatistics":
        """Statistics from accumulators that share their principal components; a `SOAPError` if one is empty."""
        principal = real.principal
        p, q = real.response(), synthetic.response()
        unresolved = ~principal.resolved
        return cls(
            mean=principal.mean.cpu(),
            eigenvalues=principal.eigenvalues.cpu(),
            scores=semantic_invariance(p, q).masked_fill(unresolved, 0).cpu(),
            standard_errors=_jackknife_errors(real, synthetic).masked_fill(unresolved, 0).cpu(),
            component_indices=torch.arange(len(principal.mean)),
            components=principal.components.cpu(),
            real_response=p.cpu(),
            synthetic_response=q.cpu(),
            num_real=real.num_images,
            num_synthetic=synthetic.num_images,
        )

    def weights(self, mu: Mu = "auto", tau: float = 0.05, threshold: float = 0.75) -> Tensor:
        """Suppression weight of every component, `(D,)` float64; arguments as `suppression_weights`."""
        return suppression_weights(self.scores, mu=mu, tau=tau, threshold=threshold)

    def projection(self, mu: Mu = "auto", tau: float = 0.05, threshold: float = 0.75) -> SOAPProjection:
        """The projection that removes components with a weight above 1e-4, in order of decreasing score.

        Raises:
            SOAPError: `mu` asks for more components than were saved, or an argument is out of range.
        """
        weights = self.weights(mu, tau, threshold)
        removed = torch.argsort(self.scores, descending=True, stable=True)
        removed = removed[weights[removed] > NEGLIGIBLE_WEIGHT]
        return SOAPProjection(self.components[:, self.columns(removed.tolist())], weights[removed])

    def reach(self, tau: float = 0.05) -> int:
        """The largest whole `mu` for which `projection` has all vectors that it needs, at this `tau`.

        Example:
            >>> import torch
            >>> real, synthetic = torch.randn(2, 64, 2, 2, 8)
            >>> SOAPStatistics.from_tokens(real, synthetic).reach()
            8
        """
        held = torch.zeros(len(self.scores), dtype=torch.bool)
        held[self.component_indices] = True
        largest = len(self.component_indices)
        return next(mu for mu in range(largest, -1, -1) if held[self.weights(mu, tau) > NEGLIGIBLE_WEIGHT].all())

    def columns(self, numbers: Sequence[int]) -> list[int]:
        """Where the vectors and responses of these components stand; a `SOAPError` if some were not saved."""
        known = {number: column for column, number in enumerate(self.component_indices.tolist())}
        absent = [number for number in numbers if number not in known]
        if absent:
            raise SOAPError(
                f"{len(numbers)} components are asked for, but these statistics do not hold the vectors of "
                f"{len(absent)} of them (number {absent[0]} is the first); ask for fewer, or fit again."
            )
        return [known[number] for number in numbers]

    def table(
        self, mu: Mu = "auto", tau: float = 0.05, threshold: float = 0.75, *, rows: int = 10
    ) -> list[dict[str, Any]]:
        """The highest-scoring components, at least `rows` and all that are removed, one dict each.

        Keys: `rank`, `component` (its number in order of decreasing variance), `score`, `standard_error`,
        `variance_share` (of the total variance of the patch tokens) and `weight`.
        """
        weights = self.weights(mu, tau, threshold)
        order = torch.argsort(self.scores, descending=True, stable=True)
        shown = max(rows, int((weights > NEGLIGIBLE_WEIGHT).sum()))
        shares = self.eigenvalues / self.eigenvalues.sum()
        return [
            {
                "rank": rank,
                "component": number,
                "score": float(self.scores[number]),
                "standard_error": float(self.standard_errors[number]),
                "variance_share": float(shares[number]),
                "weight": float(weights[number]),
            }
            for rank, number in enumerate(order[:shown].tolist())
        ]

    def save(self, path: str | os.PathLike, *, num_components: int = STORED_COMPONENTS) -> None:
        """Writes one safetensors file: scores and variances of all components, vectors and responses of some.

        These are the `num_components` with the highest scores, and the 16 of largest variance. An `OutputError` says
        that the file cannot be written.
        """
        order = torch.argsort(self.scores[self.component_indices], descending=True, stable=True)
        best, others = order[:num_components], order[num_components:]
        keep = torch.cat((best, others[self.component_indices[others] < LEADING_COMPONENTS]))
        tensors = {single.name: getattr(self, single.name) for single in fields(self)}
        counts = {name: str(tensors.pop(name)) for name in _COUNTS}
        tensors["component_indices"] = self.component_indices[keep]
        for name in ("components", "real_response", "synthetic_response"):
            tensors[name] = tensors[name][..., keep].to(torch.float32)
        write_tensors(path, tensors, counts)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SOAPStatistics":
        """Reads what `save` wrote; a `HeadError` if it is missing or not safetensors, or does not fit together."""
        names = {single.name for single in fields(cls)} - set(_COUNTS)
        tensors, metadata = read_tensors(path, names, what="statistics file")
        try:
            values: dict[str, Any] = {**tensors, **{name: int(metadata[name]) for name in _COUNTS}}
        except (KeyError, ValueError) as error:
            raise HeadError(f"The statistics file {path} lacks its image counts; fetch or fit it again.") from error
        statistics = cls(**values)
        if not statistics._consistent():
            raise HeadError(f"The tensors of the statistics file {path} do not fit together; fetch or fit it again.")
        return statistics

    def _consistent(self) -> bool:
        dim, indices = len(self.mean) if self.mean.ndim == 1 else -1, self.component_indices
        per_component = (self.eigenvalues, self.scores, self.standard_errors)
        responses = (self.real_response, self.synthetic_response)
        return (
            all(tensor.shape == (dim,) and tensor.is_floating_point() for tensor in (self.mean, *per_component))
            and indices.ndim == 1
            and indices.dtype == torch.int64
            and len(indices) <= dim
            and len(indices.unique()) == len(indices)
            and bool(((indices >= 0) & (indices < dim)).all())
            and self.components.shape == (dim, len(indices))
            and all(tensor.is_floating_point() for tensor in (self.components, *responses))
            and self.real_response.shape == self.synthetic_response.shape
            and self.real_response.ndim >= 2
            and self.real_response.shape[-1] == len(indices)
            and all(bool(((part >= 0) & (part <= 1 + 1e-6)).all()) for part in (self.scores, *responses))
            and bool((self.eigenvalues >= 0).all() and 0 < self.eigenvalues.sum() < math.inf)
            and min(self.num_real, self.num_synthetic) > 0
        )


def _jackknife_errors(real: ResponseCounts, synthetic: ResponseCounts) -> Tensor:
    """Delete-a-group jackknife: images are independent, positions of one image are not."""
    p, q = real.response(), synthetic.response()
    replicates = (
        [semantic_invariance(part, q) for part in real.leave_one_group_out()],
        [semantic_invariance(p, part) for part in synthetic.leave_one_group_out()],
    )
    variance = torch.zeros_like(p[(0,) * (p.ndim - 1)])
    for scores in filter(None, replicates):
        deviations = torch.stack(scores) - torch.stack(scores).mean(dim=0)
        variance += (len(scores) - 1) / len(scores) * deviations.square().sum(dim=0)
    return variance.sqrt()
