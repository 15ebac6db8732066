"""When a fit has settled: what it would remove hardly moves any more as images are added."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..processes import from_main
from ..runtime.projection import SOAPProjection
from ..statistics import NEGLIGIBLE_WEIGHT

CHECK_EVERY = 128
"""Images between two checks; an eighth of those seen so far once that is more."""

STEADY_CHECKS = 3
"""So many checks running must find no movement."""

REPORTED_TOLERANCE = 0.05
"""The movement that counts as settled in the report of a fit without a tolerance of its own."""


def projector_distance(one: SOAPProjection, other: SOAPProjection) -> float:
    r"""How far apart two projections are: the spectral norm of the difference of their matrices.

    For weights of 1 and equal ranks it is the sine of the largest principal angle between the removed subspaces.

    Args:
        one, other ([`SOAPProjection`]): of one width.

    Returns:
        `float`, from 0 to 1.

    Example:
        >>> first, second = (SOAPProjection(torch.eye(4)[:, [d]], torch.tensor([0.9])) for d in (0, 1))
        >>> round(projector_distance(first, first), 6), round(projector_distance(first, second), 6)
        (0.0, 0.9)
    """
    directions = torch.cat((one.basis, other.basis), dim=1).double()
    weights = torch.cat((one.weights, -other.weights)).double()
    if not len(weights):
        return 0.0
    triangle = torch.linalg.qr(directions).R
    return float(torch.linalg.eigvalsh(triangle * weights @ triangle.T).abs().max())


@dataclass(frozen=True)
class Removal:
    """What a fit would remove from one layer, and the scores behind it."""

    projection: SOAPProjection
    scores: Tensor  # decreasing; those of the removed components and the next one

    @classmethod
    def of(cls, scores: Tensor, components: Tensor, weigh: Callable[[Tensor], Tensor]) -> "Removal":
        """From the scores `(D,)` of all components and their vectors `(D, D)`, in columns."""
        weights = weigh(scores)
        removed = weights > NEGLIGIBLE_WEIGHT
        top = scores.sort(descending=True).values[: int(removed.sum()) + 1]
        return cls(SOAPProjection(components[:, removed].cpu(), weights[removed].cpu()), top.cpu())

    def movement(self, other: "Removal") -> float:
        """The larger of the projectors' distance and the largest change of a score, rank by rank."""
        shared = min(len(self.scores), len(other.scores))
        change = float((self.scores[:shared] - other.scores[:shared]).abs().max())
        return max(projector_distance(self.projection, other.projection), change)


@dataclass
class Convergence:
    """Follows what a fit would remove, check by check."""

    tolerance: float = REPORTED_TOLERANCE  # movements below it count as none
    checked_at: int = 0
    steady: int = 0
    converged_after: int | None = None  # images seen when the fit had settled
    removals: dict[int, Removal] = field(default_factory=dict)

    def due(self, num_images: int) -> bool:
        """Whether so many images ask for a check."""
        step = max(CHECK_EVERY, self.checked_at // 8)
        return self.converged_after is None and num_images >= self.checked_at + step

    def check(self, num_images: int, removals: dict[int, Removal]) -> None:
        """Compares what would be removed now, of each layer, with the last check. Collective."""
        if self.removals:
            moved = max(removal.movement(self.removals[layer]) for layer, removal in removals.items())
            moved = float(from_main(torch.tensor(moved, dtype=torch.float64)))  # one verdict for all processes
            self.steady = self.steady + 1 if moved < self.tolerance else 0
        self.checked_at, self.removals = num_images, removals
        if self.steady == STEADY_CHECKS:
            self.converged_after = num_images
