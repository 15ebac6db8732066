"""One comparison: a head, the arms that clean its raw tokens, and the pixels they are made from."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call_convention import evaluation_mode
from ..errors import NonFiniteTokensError
from ..modeling_soap import SOAPModelWrapper
from ..preprocessing import ImagePreprocessor
from ..probing import layer_tokens
from ..projection import SOAPProjection
from .arms import arm_projections, head_layer, head_preprocessor
from .examples import Example, Examples, Prepared


class RawTokens(NamedTuple):
    """Patch tokens `(B, *grid, D)` and, where there are any, CLS tokens `(B, D)`, as the backbone made them."""

    patches: Tensor
    cls: Tensor | None


@dataclass(frozen=True)
class Comparison:
    """What every evaluation needs of a head; `Comparison.of(model)` makes one.

    Attributes:
        model ([`SOAPModelWrapper`]): the head and its backbone.
        layer (`int`): the layer that is compared.
        preprocess ([`ImagePreprocessor`]): makes the pixels.
        arms (`dict[str, SOAPProjection]`): as `arm_projections` gives them; all clean the same raw tokens.
    """

    model: SOAPModelWrapper
    layer: int
    preprocess: ImagePreprocessor
    arms: dict[str, SOAPProjection]

    @classmethod
    def of(
        cls,
        model: SOAPModelWrapper,
        methods: Iterable[str] = ("soap",),
        *,
        rank: int | None = None,
        layer: int | None = None,
        image_size: int | tuple[int, int] | None = None,
    ) -> "Comparison":
        """The comparison of `methods` on one layer; arguments as in `arm_projections` and `head_preprocessor`."""
        layer, preprocess = head_layer(model, layer), head_preprocessor(model, image_size)
        return cls(
            model, layer, preprocess, arm_projections(model, methods, preprocess=preprocess, rank=rank, layer=layer)
        )

    @torch.no_grad()
    def raw_tokens(self, pixels: Tensor) -> RawTokens:
        """Runs the backbone once and leaves its tokens as they are.

        Args:
            pixels (`torch.Tensor` of shape `(B, 3, H, W)`): as the image processor makes them, on any device.

        Raises:
            NonFiniteTokensError: a token holds NaN or Inf.
        """
        layout = self.model.layouts[self.layer]
        with evaluation_mode(self.model), self.model.disabled():
            outputs = self.model(pixels.to(self.model.device, self.model.dtype))
        tokens = layer_tokens(outputs, self.layer).float()
        if not torch.isfinite(tokens).all():
            raise NonFiniteTokensError(
                f"The backbone's tokens hold NaN or Inf in {self.model.dtype}: check its weights."
            )
        patches = layout.patches(tokens, (pixels.shape[-2], pixels.shape[-1]))
        return RawTokens(patches, tokens[:, 0] if layout.order == "tokens" and layout.prefix else None)

    def read(
        self, examples: Examples, batch_size: int, *, phase: str, progress: bool
    ) -> Iterator[tuple[list[Prepared], RawTokens]]:
        """Each batch of images, as the head's image processor crops and resizes them, and its raw tokens."""
        for batch in examples.batches(self._pixels, batch_size, phase=phase, progress=progress):
            yield batch, self.raw_tokens(torch.stack([one.value for one in batch]))

    def _pixels(self, example: Example) -> Tensor:
        return self.preprocess(example.image)

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on, for a summary."""
        config = self.model.config
        return {
            "backbone": config.backbone_name_or_path,
            "backbone_revision": config.backbone_revision,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "layer": self.layer,
            "image_size": list(self.preprocess.size),
            "mu": config.mu,
            "tau": config.tau,
            "threshold": config.threshold,
            "ranks": {name: arm.rank for name, arm in self.arms.items()},
        }
