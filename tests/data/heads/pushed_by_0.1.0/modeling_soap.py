"""The wrapper: a vision backbone whose patch tokens come out clean."""

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .backbones import bare_backbone, load_backbone, random_backbone
from .call_convention import CallConvention, unmasked
from .configuration_soap import SOAPConfig
from .errors import HeadError
from .patch_layout import PatchLayout, as_size
from .pooling import Pooling, pool_tokens
from .probing import Probe, layer_tokens, probe_size, replace_layer_tokens
from .projection import SOAPProjection
from .saved_head import SavedHead
from .soap_statistics import SOAPStatistics


class SOAPModelWrapper(SavedHead):
    """A vision backbone whose patch tokens come out clean (arXiv 2604.00172).

    The head removes directions from the patch tokens of the layers it was fitted on; prefix and suffix tokens, pooled
    output and everything else pass through as the backbone made them. Cleaning never feeds later blocks: with
    `layer=i`, `hidden_states[i]` comes out clean and `last_hidden_state` as it was.

    Saving writes the head alone; the backbone is referenced by hub id or folder and loaded again from there.

    Args:
        config ([`SOAPConfig`]): the head's configuration.
        backbone (`PreTrainedModel`, *optional*): the live backbone; without it one is built from `config.backbone`,
            with random weights, as `from_config` does.
        projections (`dict[int, SOAPProjection]`, *optional*): one for each of `config.layers`; default: identities.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTModel
        >>> from soap_hf import SOAPModelWrapper, SOAPProjection
        >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        ...                          image_size=32, patch_size=8)).eval()
        >>> direction = torch.eye(8)[:, :1]
        >>> model = SOAPModelWrapper.from_backbone(vit, SOAPProjection(direction, torch.ones(1)))
        >>> tokens = model(torch.zeros(1, 3, 32, 32)).last_hidden_state  # (batch, CLS + patches, width)
        >>> tokens.shape, bool(tokens[0, 1:, 0].abs().max() < 1e-6)
        (torch.Size([1, 17, 8]), True)
    """

    config_class = SOAPConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: SOAPConfig,
        backbone: PreTrainedModel | None = None,
        projections: Mapping[int, SOAPProjection] | None = None,
    ):
        super().__init__(config)
        if backbone is None:
            if config.backbone is None:
                raise HeadError("The config holds no backbone configuration; use from_pretrained or from_backbone.")
            backbone = random_backbone(config.backbone)
        self.backbone = unmasked(backbone)
        if projections is None:
            projections = {
                layer: SOAPProjection(torch.eye(dim, rank), torch.zeros(rank))
                for layer, dim, rank in zip(config.layers, config.hidden_sizes, config.ranks, strict=True)
            }
        self.projections = nn.ModuleDict({str(layer): projection for layer, projection in projections.items()})
        self.layouts = {
            layer: PatchLayout.from_dict(layout) for layer, layout in zip(config.layers, config.layouts, strict=True)
        }
        self._convention = CallConvention.of(self.backbone)
        self._cleaning = True
        self._remember_backbone()
        self.post_init()

    def init_weights(self) -> None:
        """Does nothing: the backbone comes with its weights, and a head has none to draw."""

    @classmethod
    def from_backbone(
        cls,
        backbone: PreTrainedModel | str | os.PathLike,
        projection: SOAPProjection | Mapping[int, SOAPProjection | None] | None,
        *,
        name_or_path: str | None = None,
        revision: str | None = None,
        layout: PatchLayout | Mapping[int, PatchLayout] | None = None,
        layer: int = -1,
        image_size: int | tuple[int, int] | None = None,
        image_processor: Any = None,
        statistics: SOAPStatistics | Mapping[int, SOAPStatistics] | None = None,
    ) -> "SOAPModelWrapper":
        """Puts a projection on a backbone.

        Args:
            backbone (`PreTrainedModel` or `str`): live model (shared, not copied; its config stays as it is), hub id
                or folder.
            projection ([`SOAPProjection`], or a dict of them by layer): what to remove; `None` removes nothing.
            name_or_path (`str`, *optional*): where the backbone is found again; default: where the model came from.
            revision (`str`, *optional*): commit of the backbone.
            layout ([`PatchLayout`], or a dict of them by layer, *optional*): found if not given.
            layer (`int`, defaults to -1): which tensor a single projection belongs to.
            image_size (`int` or `(height, width)`, *optional*): size at which the backbone is looked at; default: its
                native size, else 224.
            image_processor (*optional*): saved beside the head.
            statistics ([`SOAPStatistics`], or a dict of them by layer, *optional*): saved beside the head; `reweight`
                needs them.

        Raises:
            BackboneError: the backbone cannot be loaded or has no patch tokens.
            LayoutError: its patch tokens were not found.
            HeadError: the projection has another width than the tokens.
        """
        if isinstance(backbone, (str, os.PathLike)):
            name_or_path = name_or_path or os.fspath(backbone)
            backbone = load_backbone(os.fspath(backbone), **({"revision": revision} if revision else {}))
        backbone = bare_backbone(backbone)
        wanted = dict(projection) if isinstance(projection, Mapping) else {layer: projection}
        given = dict(layout) if isinstance(layout, Mapping) else {} if layout is None else {layer: layout}
        probe = Probe(backbone, as_size(image_size) or probe_size(backbone), any(key >= 0 for key in wanted))
        projections: dict[int, SOAPProjection] = {}
        layouts: dict[int, PatchLayout] = {}
        for key, single in wanted.items():
            layouts[key] = given.get(key) or PatchLayout.from_probe(probe, key)
            width = layouts[key].patches(probe.tokens(key), probe.size).shape[-1]
            projections[key] = SOAPProjection.identity(width) if single is None else single
            if projections[key].dim != width:
                raise HeadError(
                    f"The projection is for tokens of width {projections[key].dim}, but those of layer {key} of "
                    f"{type(backbone).__name__} have width {width}; fit a head for this backbone and layer."
                )
        config = SOAPConfig(
            backbone=_config_copy(backbone),
            backbone_name_or_path=_lasting_reference(name_or_path or backbone.config.name_or_path),
            backbone_revision=revision,
            backbone_dtype=str(backbone.dtype).removeprefix("torch."),
            layers=list(projections),
            hidden_sizes=[single.dim for single in projections.values()],
            ranks=[single.rank for single in projections.values()],
            layouts=[single.to_dict() for single in layouts.values()],
        )
        model = cls(config, backbone, {key: single.to(backbone.device) for key, single in projections.items()})
        model._image_processor = image_processor
        if statistics is not None:
            model.set_statistics(statistics if isinstance(statistics, Mapping) else {layer: statistics})
        model.training = backbone.training  # not train(): it would put every part of a live backbone in this mode
        return model

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_raw: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        pooling: Pooling | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the backbone and cleans its patch tokens.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): as the image processor makes them. A video backbone
                also takes clips `(B, T, 3, H, W)` (by the name `pixel_values_videos` too), and repeats a still over
                its frames; SigLIP 2 also takes its processor's patches, with `spatial_shapes` and
                `pixel_attention_mask`.
            output_raw (`bool`, defaults to `False`): add the raw tokens of the same forward pass, as
                `raw_last_hidden_state`, or `raw_hidden_states` for a head on other layers.
            output_hidden_states (`bool`, *optional*): as in transformers; set by itself if the head cleans one.
            return_dict (`bool`, *optional*): `False` returns a tuple.
            pooling (`str`, *optional*): add `image_embeds`, one vector an image made of the tokens of the last layer
                listed: `"mean"` of the clean patches, `"cls"` or `"cls+mean"`.
            kwargs: handed to the backbone. Position embeddings are interpolated where the backbone can and must.

        Returns:
            The backbone's own output class; `output[0]` is `last_hidden_state`, clean.

        Raises:
            HeadError: the tokens have another width than the head.
            LayoutError: the patch tokens do not lie where the head expects them.
        """
        if pixel_values is None:
            pixel_values = kwargs.pop("pixel_values_videos", None)
        if pixel_values is None:
            raise HeadError("A forward pass needs pixel_values.")
        needs_states = any(layer >= 0 for layer in self.config.layers)
        if output_hidden_states or needs_states or (output_hidden_states is None and self.config.output_hidden_states):
            kwargs["output_hidden_states"] = True
        if self.config.output_attentions:
            kwargs.setdefault("output_attentions", True)
        outputs = self.backbone(**self._convention.complete(pixel_values, kwargs))
        if self._cleaning:
            for layer in self.config.layers:
                self._clean(outputs, layer, output_raw)
        if pooling is not None:
            layer, size = self.config.layers[-1], (pixel_values.shape[-2], pixel_values.shape[-1])
            outputs["image_embeds"] = pool_tokens(layer_tokens(outputs, layer), self.layouts[layer], size, pooling)
        return outputs.to_tuple() if return_dict is False else outputs

    def _clean(self, outputs: Any, layer: int, output_raw: bool) -> None:
        raw = layer_tokens(outputs, layer)
        if output_raw and layer == -1:
            outputs["raw_last_hidden_state"] = raw
        elif output_raw and "raw_hidden_states" not in outputs:
            outputs["raw_hidden_states"] = outputs.hidden_states
        clean = self.layouts[layer].map_patches(raw, self.projections[str(layer)])
        replace_layer_tokens(outputs, layer, clean)

    def patch_tokens(self, pixel_values: Tensor, layer: int | None = None, *, raw: bool = False) -> Tensor:
        """Patch tokens on their grid, `(B, *grid, D)`, clean or raw.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): as the image processor makes them.
            layer (`int`, *optional*): one of the head's layers; default: the last one.
            raw (`bool`, defaults to `False`): leave the tokens as the backbone made them.
        """
        layer = self.config.layers[-1] if layer is None else layer
        with self.disabled() if raw else nullcontext():
            tokens = layer_tokens(self(pixel_values), layer)
        height, width = pixel_values.shape[-2:]
        return self.layouts[layer].patches(tokens, (height, width))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The bare backbone within a `with` block (a ViTMAE still returns every patch, in raster order)."""
        before, self._cleaning = self._cleaning, False
        try:
            yield
        finally:
            self._cleaning = before

    def reweight(
        self, mu: float | Literal["auto"] = "auto", tau: float = 0.05, threshold: float = 0.75
    ) -> "SOAPModelWrapper":
        """Another strength, from the stored statistics and without a new fit; returns itself.

        Args:
            mu (`float` or `"auto"`), tau (`float`), threshold (`float`): as in `suppression_weights`.

        Raises:
            HeadError: the head was saved without statistics.
            SOAPError: an argument is out of range.
        """
        if not self.statistics_by_layer:
            raise HeadError("This head was saved without statistics, which reweight needs; fit it again.")
        chosen = {layer: self._statistics[layer].projection(mu, tau, threshold) for layer in self.config.layers}
        for layer, projection in chosen.items():
            self.projections[str(layer)] = projection.to(self.device)
        self.config.mu, self.config.tau, self.config.threshold = mu, tau, threshold
        self.config.ranks = [projection.rank for projection in chosen.values()]
        self.config.components = [self._statistics[layer].table(mu, tau, threshold) for layer in self.config.layers]
        return self

    def set_attn_implementation(self, attn_implementation: Any, **kwargs: Any) -> None:
        """As in transformers, and for the parts of a ViTMAE too, which keep the config they were made with."""
        super().set_attn_implementation(attn_implementation, **kwargs)
        for module in self.backbone.modules():
            config = getattr(module, "config", None)
            if config is not None and config is not self.backbone.config:
                config._attn_implementation = self.backbone.config._attn_implementation

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's own."""
        return self.backbone.get_input_embeddings()


def _lasting_reference(name: str | None) -> str | None:
    """A hub id as it is; a folder with its whole path, since the working directory may change."""
    return os.path.abspath(name) if name and os.path.isdir(name) else name or None


def _config_copy(backbone: PreTrainedModel) -> Any:
    """The backbone's config without its path, which may be private; `None` if transformers does not know the type."""
    if backbone.config.model_type not in CONFIG_MAPPING:
        return None
    config = copy.deepcopy(backbone.config)
    config._name_or_path = ""
    config.architectures = [type(backbone).__name__]
    return config
