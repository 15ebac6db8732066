"""One comparison: a head, the methods that clean its raw tokens, and the pixels they are made from."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..data.preprocessing import ImagePreprocessor
from ..heads.model import SOAPModelWrapper
from ..heads.running import RawTokens, head_preprocessor, read_raw_tokens
from ..layout.probing import evaluation_mode
from ..runtime.errors import LayoutError
from ..runtime.patch_layout import check_finite
from ..runtime.projection import SOAPProjection
from ..statistics.semantic_invariance import Mu
from .examples import Examples
from .methods import head_layer, method_projections, own_method
from .results import Results, summary
from .sharing import Part


@dataclass(frozen=True)
class Comparison:
    """What every evaluation needs of a head; `Comparison.of(model)` makes one.

    Attributes:
        model ([`SOAPModelWrapper`]): the head and its backbone.
        layer (`int`): the layer that is compared.
        preprocess ([`ImagePreprocessor`]): makes the pixels.
        methods (`dict[str, SOAPProjection]`): as `method_projections` gives them; all clean the same raw tokens.
        share (`bool`): whether the processes of `accelerate launch` or `torchrun` share the images of an evaluation,
            which each of them must then call; all get the same results.
    """

    model: SOAPModelWrapper
    layer: int
    preprocess: ImagePreprocessor
    methods: dict[str, SOAPProjection]
    share: bool = False

    @classmethod
    def of(
        cls,
        model: SOAPModelWrapper,
        methods: Iterable[str] | None = None,
        *,
        mu: Iterable[Mu] = (),
        rank: int | None = None,
        layer: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        preprocess: ImagePreprocessor | None = None,
        share: bool = False,
    ) -> "Comparison":
        """The comparison of `methods`, and of SOAP at the strengths `mu`, on one layer; all clean the same raw tokens.

        Arguments are those of `method_projections` and `head_preprocessor`.

        Example:
            >>> from transformers import ViTConfig, ViTModel
            >>> from soap_hf import SOAPStatistics
            >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32,
            ...                          intermediate_size=8, patch_size=8))
            >>> statistics = SOAPStatistics.from_tokens(*torch.randn(2, 64, 4, 4, 8))
            >>> model = SOAPModelWrapper.from_backbone(vit, None, statistics=statistics)
            >>> list(Comparison.of(model, ["soap", "top-pc"], mu=["auto", 1, 2], rank=1).methods)
            ['raw', 'soap', 'top-pc', 'soap mu=1', 'soap mu=2']
        """
        layer, preprocess = head_layer(model, layer), preprocess or head_preprocessor(model, image_size)
        projections = method_projections(model, methods, mu=mu, preprocess=preprocess, rank=rank, layer=layer)
        return cls(model, layer, preprocess, projections, share)

    @cached_property  # it costs a forward pass
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches, for images of the head's size.

        Raises:
            LayoutError: there are no rows and columns.
        """
        with torch.no_grad(), evaluation_mode(self.model):
            read = read_raw_tokens(self.model, torch.zeros(1, 3, *self.preprocess.size), "an empty image")
        patches = read[self.layer].patches
        if patches.ndim not in (4, 5):
            raise LayoutError(f"The patches of layer {self.layer} have no rows and columns, which matching needs.")
        return patches.shape[-3], patches.shape[-2]

    @torch.no_grad()
    def raw_tokens(self, pixels: Tensor) -> RawTokens:
        """Runs the backbone once and leaves its tokens as they are, in float32.

        Args:
            pixels (`torch.Tensor` of shape `(B, 3, H, W)`): as the image processor makes them, on any device.

        Raises:
            NonFiniteTokensError: a token holds NaN or Inf.
        """
        with evaluation_mode(self.model):
            patches, cls = read_raw_tokens(self.model, pixels, "these images")[self.layer]
        if cls is not None:
            check_finite(cls, "The CLS tokens of these images")
        return RawTokens(patches.float(), None if cls is None else cls.float())

    def measured(
        self, examples: Examples, measure: Callable[[RawTokens], Any], batch_size: int, **options: Any
    ) -> list[Part]:
        """What `measure` makes of the raw tokens of the images, as the head's image processor crops and resizes them.

        `options` are `phase` and `progress`; see [`Examples.measured`].
        """
        prepare = self.preprocess.of_example
        return examples.measured(
            prepare, lambda pixels: measure(self.raw_tokens(pixels)), batch_size, share=self.share, **options
        )

    def results(
        self,
        name: str,
        rows: Sequence[dict[str, Any]],
        metrics: Iterable[str],
        *,
        counts: dict[str, int],
        command: str | None,
        **settings: Any,
    ) -> Results:
        """What an evaluation found, from its rows; `settings` are those that it has beside the comparison's."""
        config = self.model.config
        own = {
            "backbone": config.backbone_name_or_path,
            "backbone_revision": config.backbone_revision,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "layer": self.layer,
            "image_size": list(self.preprocess.size),
            "method": own_method(self.model),
            "mu": config.mu,
            "tau": config.tau,
            "threshold": config.threshold,
            "ranks": {name: projection.rank for name, projection in self.methods.items()},
        }
        found = summary(rows, self.methods, metrics, counts=counts, settings={**own, **settings}, command=command)
        return Results(name, list(rows), found)
