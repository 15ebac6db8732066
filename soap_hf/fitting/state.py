"""How far a fit has come: all that is needed to go on from there."""

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ..data.image_files import BadImage
from ..processes import gather_lists
from ..runtime.projection import SOAPProjection
from ..statistics.token_statistics import PrincipalComponents, ResponseCounts, TokenMoments
from .convergence import Convergence, Removal
from .processes import merged_counts, merged_moments

Phase = Literal["components", "real responses", "synthetic responses"]

PROGRESS = ("phase", "position", "end", "num_read", "num_bad")
CHECKS = ("checked_at", "steady", "converged_after")
"""What a checkpoint holds of a state and of its convergence, beside tensors and bad images."""


@dataclass
class FitState:
    """What this process has added up, of each layer, and how far all of them have come."""

    moments: dict[int, TokenMoments]  # filled in the phase "components"
    phase: Phase = "components"
    position: int = 0  # images of this phase, in their recorded order, that all processes have worked off
    end: int = 0  # position up to which the real images were read, once they are
    num_read: int = 0  # real images read by all processes …
    num_bad: int = 0  # … and unreadable ones among them
    bad_images: list[BadImage] = field(default_factory=list)  # those that this process could not read
    real: dict[int, ResponseCounts] = field(default_factory=dict)  # filled in the later phases, as the next
    synthetic: dict[int, ResponseCounts] = field(default_factory=dict)
    convergence: Convergence = field(default_factory=Convergence)

    @property
    def num_readable(self) -> int:
        """Real images whose tokens are in the moments of all processes."""
        return self.num_read - self.num_bad

    def merged(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What all processes have added up, as tensors and as values for JSON. Collective."""
        tensors: dict[str, Tensor] = {}
        if self.phase == "components":
            for layer, moments in self.moments.items():
                tensors |= _named("moments", layer, merged_moments(moments).tensors())
        for layer, counts in self.real.items():
            tensors |= _named("principal", layer, counts.principal._asdict())
            tensors |= _named("real", layer, merged_counts(counts).tensors())
        for layer, counts in self.synthetic.items():
            tensors |= _named("synthetic", layer, merged_counts(counts).tensors())
        for layer, removal in self.convergence.removals.items():
            projection = {"basis": removal.projection.basis, "weights": removal.projection.weights}
            tensors |= _named("removal", layer, {**projection, "scores": removal.scores})
        values = {name: getattr(self, name) for name in PROGRESS}
        values |= {name: getattr(self.convergence, name) for name in CHECKS}
        bad = [[bad.name, bad.reason] for bad in gather_lists(self.bad_images)]
        return tensors, {**values, "bad_images": bad}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any], with_sums: bool) -> None:
        """Takes over what `merged` gave; exactly one process must take it `with_sums`."""
        for name in PROGRESS:
            setattr(self, name, values[name])
        for name in CHECKS:
            setattr(self.convergence, name, values[name])
        self.bad_images = [BadImage(*bad) for bad in values["bad_images"]] if with_sums else []
        for layer, moments in self.moments.items():
            if self.phase == "components":
                if saved := _unnamed("removal", layer, tensors):
                    projection = SOAPProjection(saved["basis"], saved["weights"])
                    self.convergence.removals[layer] = Removal(projection, saved["scores"])
                if with_sums:
                    moments.load(_unnamed("moments", layer, tensors))
                continue
            principal = _unnamed("principal", layer, tensors)
            principal = {name: tensor.to(moments.mean.device) for name, tensor in principal.items()}
            for kind, counts in (("real", self.real), ("synthetic", self.synthetic)):
                if saved := _unnamed(kind, layer, tensors):
                    grid = tuple(saved["positive"].shape[1:-1])
                    counts[layer] = ResponseCounts(PrincipalComponents(**principal), grid, moments.products)
                    if with_sums:
                        counts[layer].load(saved)


def _named(kind: str, layer: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{kind}.{layer}.{name}": tensor for name, tensor in tensors.items()}


def _unnamed(kind: str, layer: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = f"{kind}.{layer}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
