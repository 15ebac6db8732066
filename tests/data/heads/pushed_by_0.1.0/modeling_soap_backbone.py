"""A head as a transformers backbone: clean feature maps for dense heads (UperNet, Mask2Former, MaskFormer, …)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from .configuration_soap import SOAPConfig
from .errors import LayoutError
from .layout_evidence import CLIPS
from .modeling_soap import SOAPModelWrapper
from .probing import layer_tokens
from .projection import SOAPProjection


class SOAPBackbone(BackboneMixin, SOAPModelWrapper):
    """A vision backbone whose clean patch tokens come out as feature maps, a stage for each layer of the head.

    Stages are named `layer<i>`, and `last` for `last_hidden_state`; `out_features` or `out_indices` of the config
    choose among them (default: all, in the order of the head). The same head loads as [`SOAPModelWrapper`] too.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTModel
        >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        ...                          image_size=32, patch_size=8)).eval()
        >>> projection = SOAPProjection(torch.eye(8)[:, :1], torch.ones(1))
        >>> backbone = SOAPBackbone.from_backbone(vit, {1: None, -1: projection})
        >>> backbone.out_features, backbone.channels
        (['layer1', 'last'], [8, 8])
        >>> [tuple(stage.shape) for stage in backbone(torch.zeros(2, 3, 32, 64)).feature_maps]
        [(2, 8, 4, 8), (2, 8, 4, 8)]
    """

    def __init__(
        self,
        config: SOAPConfig,
        backbone: PreTrainedModel | None = None,
        projections: Mapping[int, SOAPProjection] | None = None,
    ):
        if config.out_features is None:
            config.set_output_features_output_indices(list(config.stage_names), None)
        super().__init__(config, backbone, projections)
        self.num_features = list(config.hidden_sizes)
        if any(layout.order in CLIPS for layout in self.layouts.values()):
            raise LayoutError("Feature maps are (B, C, H, W), but the tokens of a video backbone have frames as well.")

    def post_init(self) -> None:
        """As any model's; the mixin's would hook the backbone's layers a second time and double its hidden states."""
        PreTrainedModel.post_init(self)

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        output_raw: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the backbone and gives its clean feature maps.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): as the image processor makes them.
            output_raw (`bool`, defaults to `False`): add `raw_feature_maps` of the same forward pass.
            output_hidden_states (`bool`, *optional*): add the backbone's hidden states, clean where the head is.
            return_dict (`bool`, *optional*): `False` returns a tuple.
            kwargs: handed to the backbone.

        Returns:
            `BackboneOutput` with `feature_maps`, a `(B, C, H, W)` tensor for each of `out_features`.

        Raises:
            HeadError, LayoutError: as [`SOAPModelWrapper`].
        """
        # not super(): the mixin before it in line has a forward of its own
        outputs = SOAPModelWrapper.forward(self, pixel_values, output_raw, output_hidden_states, **kwargs)
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        layers = dict(zip(self.config.stage_names, self.config.layers, strict=True))
        chosen = [layers[name] for name in self.config.out_features]
        maps = BackboneOutput(
            feature_maps=tuple(self._feature_map(layer_tokens(outputs, layer), layer, size) for layer in chosen),
            hidden_states=outputs.get("hidden_states") if output_hidden_states else None,
            attentions=outputs.get("attentions"),
        )
        if output_raw:
            maps["raw_feature_maps"] = tuple(
                self._feature_map(
                    outputs["raw_last_hidden_state"] if layer == -1 else outputs["raw_hidden_states"][layer],
                    layer,
                    size,
                )
                for layer in chosen
            )
        return maps.to_tuple() if return_dict is False else maps

    def _feature_map(self, tokens: Tensor, layer: int, size: tuple[int, int]) -> Tensor:
        return self.layouts[layer].patches(tokens, size).movedim(-1, 1)
