"""A head and its backbone, opened once for all who look: pictures of images, projections of every strength."""

from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..evaluation.comparison import Comparison
from ..evaluation.methods import (
    RAW,
    head_layer,
    layer_statistics,
    leading,
    method_projections,
    own_method,
    own_projection,
    zero_image_directions,
)
from ..evaluation.salient_object import in_whole_patches, patch_stride
from ..figures.pictures import Picture, displayed, picture_of
from ..figures.records import StoredComponent, scored_layers, stored_components
from ..heads.model import SOAPModelWrapper
from ..heads.running import head_preprocessor
from ..runtime.errors import HeadError, SOAPError
from ..runtime.projection import SOAPProjection

METHODS = {"soap": "SOAP", "zero-image": "black image (INSID3)", "top-pc": "leading components"}
"""What may be removed, and how a page calls it."""

KEPT_PROJECTIONS = 128
"""Each is as large as the directions that it removes."""


@dataclass(frozen=True)
class Choice:
    """What is looked at.

    Attributes:
        layer (`int`): one of the head's layers.
        method (`str`, defaults to `"soap"`): what removes directions, as in `method_projections`.
        strength (`float`, *optional*): how many directions; default: the head's own strength.
    """

    layer: int
    method: str = "soap"
    strength: float | None = None


class Explorer:
    """A head and its backbone; several threads may use it, and none changes it.

    Args:
        model ([`SOAPModelWrapper`]): the head, on its backbone.
        name (`str`): what to call it.
        image_size (`(height, width)`, *optional*): resize all images to that, for a backbone that takes no other.

    Raises:
        DataError: the head's image processor does not make images of one size.
    """

    def __init__(self, model: SOAPModelWrapper, name: str, *, image_size: tuple[int, int] | None = None):
        self.model, self.name, self.image_size = model, name, image_size
        self._preprocess = head_preprocessor(model)
        self._running = Lock()  # a model that is at work is in a state of its own
        self._black: dict[int, Tensor] = {}
        self._projections: dict[Choice, SOAPProjection] = {}
        self._tidying = Lock()

    @property
    def layers(self) -> list[int]:
        """The layers of the head, the default one last."""
        return list(self.model.config.layers)

    def own_strength(self, layer: int) -> float:
        """The strength that the head has: its `mu`, or as many directions as it removes of this layer."""
        config: Any = self.model.config
        rank = config.ranks[config.layers.index(head_layer(self.model, layer))]
        return float(rank) if config.mu == "auto" or rank == 0 else float(config.mu)

    def reach(self, layer: int) -> int:
        """How far the strength can go.

        Raises:
            HeadError: the head was saved without statistics, so that it has its own strength alone.
        """
        try:
            return layer_statistics(self.model, head_layer(self.model, layer)).reach(self.model.config.tau)
        except HeadError as error:
            raise HeadError(f"There is no other strength: {_lower(str(error))}") from error

    @cached_property
    def components(self) -> dict[int, list[StoredComponent]]:
        """The components of each layer whose responses can be shown, by decreasing score.

        Raises:
            HeadError: the head was saved without statistics.
        """
        layers = scored_layers(self.model)
        return {
            layer: stored_components(scored, len(scored.components))
            for layer, scored in zip(self.layers, layers, strict=True)
        }

    def look(self, image: Image.Image, layer: int, *, fine: bool = False) -> Picture:
        """The raw patch tokens of one RGB image, from a forward pass.

        As [`~soap_hf.figures.look_at`] makes them; `fine`, of the image in its displayed size instead of about that of
        the fit's images, for objects. Errors are the same.
        """
        comparison = Comparison(self.model, head_layer(self.model, layer), self._preprocess, self._raw(layer))
        size = self.image_size
        if fine:
            image = displayed(image)
            size = size or in_whole_patches((image.height, image.width), patch_stride(comparison))
        with self._running:
            return picture_of(comparison, image, size)

    def projection(self, choice: Choice) -> SOAPProjection:
        """What a choice removes, on the CPU; no forward pass, but for the one black image of `"zero-image"`.

        Raises:
            HeadError: no such layer, or the statistics that are needed were not saved.
            SOAPError: no such method, or there are not so many directions.
        """
        if choice.method not in METHODS:
            raise SOAPError(f"There is no method {choice.method!r}; choose from {', '.join(METHODS)}.")
        found = self._projections.get(choice)
        if found is None:
            found = self._projections[choice] = self._projection(choice)
        with self._tidying:
            while len(self._projections) > KEPT_PROJECTIONS:
                self._projections.pop(next(iter(self._projections)))
        return found

    @torch.no_grad()
    def _projection(self, choice: Choice) -> SOAPProjection:
        layer, own = head_layer(self.model, choice.layer), self.own_strength(choice.layer)
        strength = own if choice.strength is None else choice.strength
        removed = own_projection(self.model, layer)
        if choice.method == own_method(self.model) and strength == own:
            return SOAPProjection(removed.basis.cpu(), removed.weights.cpu())
        if choice.method == "soap":
            config = self.model.config
            return layer_statistics(self.model, layer).projection(strength, config.tau, config.threshold)
        rank = round(strength)
        if rank < 1:
            return SOAPProjection.identity(removed.dim)
        if choice.method == "zero-image":
            return leading(self._black_directions(layer), rank)
        chosen = method_projections(self.model, [choice.method], preprocess=self._preprocess, rank=rank, layer=layer)
        return chosen[choice.method].cpu()

    def _raw(self, layer: int) -> dict[str, SOAPProjection]:
        return {RAW: SOAPProjection.identity(own_projection(self.model, head_layer(self.model, layer)).dim)}

    def _black_directions(self, layer: int) -> Tensor:
        with self._running:
            if layer not in self._black:
                self._black[layer] = zero_image_directions(self.model, layer, self._preprocess)
            return self._black[layer]


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
