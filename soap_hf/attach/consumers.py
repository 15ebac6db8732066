"""Which linear maps of a model read the patch tokens as they are, and whether anything else does."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import HeadError
from ..runtime.projection import SOAPProjection
from .hosts import Hook, Host, depends, map_tokens
from .sites import Site, note_tokens

TOLERANCE = 1e-4
"""Share of the largest input up to which two inputs of a map count as the same."""


def reads_width(module: nn.Module, width: int) -> bool:
    """Whether a module is a plain linear map of tokens of this width."""
    if isinstance(module, nn.Linear):
        return module.weight.is_floating_point() and module.weight.shape[1:] == (width,)  # quantised ones are packed
    return (
        isinstance(module, nn.Conv2d)
        and module.weight.shape[1:] == (width, 1, 1)
        and module.groups == 1
        and module.padding in ((0, 0), "valid", "same")
    )


def find_readers(host: Host, site: Site) -> list[str]:
    """Paths of the linear maps that read a site's patch tokens; an error if there is none, or something else does.

    The model runs with noise on the tokens, then with the same noise and the head's directions taken out entirely: a
    map whose input changes just by those directions can take the head in.
    """
    name, weights = type(host.model).__name__, torch.ones_like(site.projection.weights)
    projection = SOAPProjection(site.projection.basis, weights)  # takes the directions out entirely
    if projection.rank == 0:
        raise HeadError("The head removes nothing (its rank is 0), so there is nothing to fold.")
    maps = {path: module for path, module in host.model.named_modules() if reads_width(module, projection.dim)}

    def disturb_and_clean(tokens: Tensor) -> Tensor:
        return site.layout.map_patches(site.disturb(tokens), projection)

    noisy, clean = _Run(host, site, maps, site.disturb), _Run(host, site, maps, disturb_and_clean)
    changed = [path for path in maps if noisy.differs(clean, path)]
    readers = [path for path in changed if noisy.differs_by(projection, clean, path)]
    if not readers:
        what = f" ({changed[0]} gets them with other tokens, or changed)" if changed else ""
        raise HeadError(
            f"No Linear or 1 x 1 convolution of {name} reads the patch tokens of layer {site.layer} as they are"
            f"{what}, so the head cannot be folded; attach it instead."
        )
    spared = _Run(host, site, maps, disturb_and_clean, {path: noisy.made[path] for path in readers})
    if depends(noisy.outputs, spared.outputs, noisy.tokens + spared.tokens):
        raise HeadError(
            f"Something else than {', '.join(readers)} depends on the patch tokens of layer {site.layer} in {name}, "
            "so the head cannot be folded; attach it instead."
        )
    others = set(host.model.modules()) - {maps[path] for path in readers}
    used_elsewhere = {id(parameter) for part in others for parameter in part._parameters.values()}
    for path in readers:
        if id(maps[path].weight) in used_elsewhere:
            raise HeadError(f"The weight of {path} is shared with another module; attach the head instead.")
    return readers


class _Run:
    """One run of a model with changed tokens, and with notes on some of its linear maps, by path.

    `change` is done to the tensor that holds the tokens; what `forced` has for a map, that gives, call by call,
    whatever it is given. Of the run there are the model's `outputs`, the changed `tokens`, and what each map was
    `given` and has `made`, call by call.
    """

    def __init__(
        self,
        host: Host,
        site: Site,
        maps: dict[str, nn.Module],
        change: Callable[[Tensor], Tensor],
        forced: dict[str, list[Tensor]] | None = None,
    ):
        self._maps, self.tokens = maps, list[Tensor]()
        self.given: dict[str, list[Tensor]] = {path: [] for path in maps}
        self.made: dict[str, list[Tensor]] = {path: [] for path in maps}
        hooks: dict[nn.Module, Hook] = {
            module: self._noting(path, (forced or {}).get(path)) for path, module in maps.items()
        }
        hooks[site.module] = lambda _, __, outputs: note_tokens(
            map_tokens(outputs, site.place, change), site.place, self.tokens
        )
        self.outputs = host.run(hooks)

    def _noting(self, path: str, forced: list[Tensor] | None) -> Hook:
        def note(_: nn.Module, arguments: Any, made: Tensor) -> Tensor:
            self.given[path].append(arguments[0])
            self.made[path].append(made)
            return made if forced is None else forced[len(self.made[path]) - 1]

        return note

    def differs(self, other: "_Run", path: str) -> bool:
        """Whether a map was given something else in another run."""
        return any(not torch.equal(mine, its) for mine, its in zip(self.given[path], other.given[path], strict=True))

    def differs_by(self, projection: SOAPProjection, other: "_Run", path: str) -> bool:
        """Whether a map was given the same in another run up to a projection, in every call."""
        axis = -3 if isinstance(self._maps[path], nn.Conv2d) else -1
        for mine, its in zip(self.given[path], other.given[path], strict=True):
            expected = projection(mine.movedim(axis, -1)).movedim(-1, axis)
            if (its - expected).abs().max() > TOLERANCE * mine.abs().max():
                return False
        return True
