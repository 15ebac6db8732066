"""The wrapper: a vision backbone whose patch tokens come out clean, loaded by the head that lies on it."""

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NoReturn

from torch import Tensor, eye, nn, zeros
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import logging

from .configuration_soap import SOAPConfig
from .errors import HeadError, LayoutError
from .head_files import HUB_KWARGS, PROCESSOR_FILE, HeadSource, check_same_architecture, commit_of
from .patch_layout import CLIPS, PatchLayout, Pooling, layer_tokens, replace_layer_tokens
from .projection import SOAPProjection
from .vision_backbone import (
    CallConvention,
    bare_backbone,
    load_backbone,
    random_backbone,
    unhooked,
    unmasked,
    warn_of_other_weights,
    weight_digests,
)

_NOT_OURS = ("_from_auto", "_from_pipeline", "_commit_hash")
logger = logging.get_logger(__name__)


def _of_the_package(what: str) -> Callable[..., NoReturn]:
    """A method that these files have not, and that says where it is."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise HeadError(f"{what} needs the package, not only the code beside the head; run pip install soap-hf.")

    return refuse


def _find_backbone(
    source: HeadSource, config: SOAPConfig, given: Any, revision: str | None, kwargs: dict[str, Any]
) -> PreTrainedModel:
    """The backbone that a head refers to, or the one `given`, live or by name; notes in the config which it is."""
    if isinstance(given, nn.Module):
        return bare_backbone(given)
    is_its_own = given in (None, config.backbone_name_or_path)
    reference, pin = source.backbone_reference(config) if is_its_own else (str(given), {})
    hub_kwargs = {name: value for name, value in source.hub_kwargs.items() if name not in ("revision", "subfolder")}
    if revision is not None:
        pin["revision"] = commit_of(reference, revision, **hub_kwargs)
        if is_its_own and config.backbone_revision not in (None, pin["revision"]):
            logger.warning(
                f"The head was fitted on revision {config.backbone_revision} of its backbone, and is put on revision "
                f"{pin['revision']}: its directions may mean something else there."
            )
    # the caller's own words first, then what AutoModel has put into the head's config
    chosen = {name: value for name, value in kwargs.items() if value is not None}
    dtype = chosen.pop("dtype", None) or chosen.pop("torch_dtype", None) or "auto"
    chosen["dtype"] = config.backbone_dtype or "auto" if dtype == "auto" else dtype
    if config._attn_implementation is not None:
        chosen.setdefault("attn_implementation", config._attn_implementation)
    # False: unset, transformers would ask on the terminal whether to run code that a stranger's head refers to
    chosen.setdefault("trust_remote_code", False)
    live = load_backbone(reference, **{**hub_kwargs, **pin, **chosen})
    if "subfolder" not in pin:  # else the backbone lies inside the head's repository, and is saved with it
        config.backbone_name_or_path, config.backbone_revision = reference, pin.get("revision")
    return live


class SOAPModelWrapper(PreTrainedModel):
    """A vision backbone whose patch tokens come out clean (arXiv 2604.00172).

    It loads and runs a head. Fitting, saving, pushing and another strength are in the package, whose class of the same
    name builds on this one and says more.
    """

    config_class = SOAPConfig
    layout_class: type[PatchLayout] = PatchLayout
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
            sizes = zip(config.layers, config.hidden_sizes, config.ranks, strict=True)
            projections = {layer: SOAPProjection(eye(dim, rank), zeros(rank)) for layer, dim, rank in sizes}
        self.projections = nn.ModuleDict({str(layer): projection for layer, projection in projections.items()})
        layouts = zip(config.layers, config.layouts, strict=True)
        self.layouts = {layer: self.layout_class.from_dict(layout) for layer, layout in layouts}
        self.convention = CallConvention.of(self.backbone)
        self._cleaning = True
        self._source: HeadSource | None = None
        self.weights_when_wrapped = weight_digests(self.backbone)
        self.post_init()

    def init_weights(self) -> None:
        """Does nothing: the backbone comes with its weights, and a head has none to draw."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        config: SOAPConfig | None = None,
        backbone: PreTrainedModel | str | None = None,
        backbone_revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Loads a head and the backbone it refers to, in evaluation mode.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): folder or hub id of the head.
            config ([`SOAPConfig`], *optional*): read from the head if not given.
            backbone (`PreTrainedModel` or `str`, *optional*): another copy of the backbone: hub id, folder or a live
                model, which stays in the mode it is in.
            backbone_revision (`str`, *optional*): default: the one that the head was fitted on; another one warns.
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download` and `subfolder` reach the
                head; everything else (`device_map`, `attn_implementation`, `trust_remote_code`, …) loads the backbone.
                The default `dtype` is the one that the head was fitted in.

        Raises:
            HeadError: the head is missing or malformed, or does not fit the backbone.
            BackboneError: the backbone cannot be loaded.
        """
        hub_kwargs = {name: kwargs.pop(name, None) for name in HUB_KWARGS}
        kwargs = {name: value for name, value in kwargs.items() if name not in _NOT_OURS}
        with_loading_info = kwargs.pop("output_loading_info", False)
        adapter, adapter_name = dict(kwargs.pop("adapter_kwargs", None) or {}), kwargs.pop("adapter_name", "default")
        source = HeadSource.open(pretrained_model_name_or_path, **hub_kwargs)
        adapter_path = adapter.pop("_adapter_model_path", None)
        if adapter_path is None and (base := source.base_of_adapter()):
            adapter_path, source = source.name_or_path, base
        own = source.config(cls.config_class)
        if config is not None and config.dtype not in (None, own.dtype):
            kwargs.setdefault("dtype", config.dtype)  # where AutoModel leaves it, before transformers 5.12
        config = own if config is None else copy.deepcopy(config)
        projections = source.projections(config)
        live = cls._find_backbone(source, config, backbone, backbone_revision, kwargs)
        check_same_architecture(config.backbone, live.config)
        config.name_or_path = source.name_or_path
        model = cls(config, live, {layer: single.to(live.device) for layer, single in projections.items()})
        warn_of_other_weights(model.backbone, model.weights_when_wrapped, config.backbone_digests)
        model._source = source
        if adapter_path is not None:  # as transformers does
            model.load_adapter(adapter_path, adapter_name, adapter_kwargs=adapter, use_safetensors=True)
        with suppress(HeadError):  # small, and wanted offline too
            source.fetch_if_there(PROCESSOR_FILE)
        # not train() or eval(): they would put every part of a live backbone into another mode
        model.training = isinstance(backbone, nn.Module) and live.training
        complete: dict[str, Any] = {key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        return (model, complete) if with_loading_info else model

    _find_backbone = staticmethod(_find_backbone)
    save_pretrained = _of_the_package("Saving a head")
    push_to_hub = _of_the_package("Pushing a head")
    from_backbone = classmethod(_of_the_package("Putting a head on a backbone"))
    reweight = _of_the_package("Another strength of a head")
    encode = _of_the_package("Encoding images")

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
                its frames; SigLIP 2 also takes its processor's patches and what goes with them.
            output_raw (`bool`, defaults to `False`): add the raw tokens of the same forward pass, as
                `raw_last_hidden_state`, or `raw_hidden_states` for a head on other layers.
            output_hidden_states (`bool`, *optional*): as in transformers; set by itself if the head cleans one.
            return_dict (`bool`, *optional*): `False` returns a tuple.
            pooling (`str`, *optional*): add `image_embeds`, one vector per image made of the tokens of the last layer
                listed: `"mean"` of the clean patches, `"cls"` or `"cls+mean"`.
            kwargs: handed to the backbone. Position embeddings are interpolated where the backbone can and must.

        Returns:
            The backbone's own output class; `output[0]` is `last_hidden_state`, clean.

        Raises:
            HeadError: the tokens have another width than the head.
            LayoutError: the patch tokens do not lie where the head expects them.
        """
        pixel_values = kwargs.pop("pixel_values_videos", None) if pixel_values is None else pixel_values
        if not isinstance(pixel_values, Tensor):
            raise HeadError(f"pixel_values must be a tensor, not {type(pixel_values).__name__}; encode takes images.")
        needs_states = any(layer >= 0 for layer in self.config.layers)
        if output_hidden_states or needs_states or (output_hidden_states is None and self.config.output_hidden_states):
            kwargs["output_hidden_states"] = True
        if self.config.output_attentions:
            kwargs.setdefault("output_attentions", True)
        outputs = self.backbone(**self.convention.complete(pixel_values, kwargs))
        if self._cleaning:
            for layer in self.config.layers:
                self._clean(outputs, layer, output_raw)
        if pooling is not None:
            layer, size = self.config.layers[-1], (pixel_values.shape[-2], pixel_values.shape[-1])
            outputs["image_embeds"] = self.layouts[layer].pooled(layer_tokens(outputs, layer), size, pooling)
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
        """Patch tokens `(B, *grid, D)` of pixels `(B, 3, H, W)`, clean or raw, of a layer; default: the last one."""
        layer = self.config.layers[-1] if layer is None else layer
        with self.disabled() if raw else nullcontext():
            tokens = layer_tokens(self(pixel_values), layer)
        return self.layouts[layer].patches(tokens, (pixel_values.shape[-2], pixel_values.shape[-1]))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The bare backbone within a `with` block (a ViTMAE still returns every patch, in raster order)."""
        before, self._cleaning = self._cleaning, False
        try:
            yield
        finally:
            self._cleaning = before

    def set_attn_implementation(self, attn_implementation: Any, **kwargs: Any) -> None:
        """As in transformers, and for the parts of a ViTMAE too, which keep the config they were made with."""
        super().set_attn_implementation(attn_implementation, **kwargs)
        for module in self.backbone.modules():
            config = getattr(module, "config", None)
            if config is not None and config is not self.backbone.config:
                config._attn_implementation = self.backbone.config._attn_implementation

    def __getstate__(self) -> dict[str, Any]:
        """What `torch.save` and other processes get: no hooks of transformers, which cannot be sent, and no token."""
        source = self._source and self._source.without_token()
        return {**self.__dict__, "_modules": {**self._modules, "backbone": unhooked(self.backbone)}, "_source": source}

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's own."""
        return self.backbone.get_input_embeddings()


class SOAPBackbone(BackboneMixin, SOAPModelWrapper):
    """A vision backbone whose clean patch tokens come out as feature maps, a stage for each layer of the head."""

    def __init__(self, config: SOAPConfig, *parts: Any, **named_parts: Any):
        if config.out_features is None:
            config.set_output_features_output_indices(list(config.stage_names), None)
        super().__init__(config, *parts, **named_parts)
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
        """Runs the backbone; arguments and errors as [`SOAPModelWrapper`]'s.

        Returns `BackboneOutput` with `feature_maps`, a `(B, C, H, W)` tensor for each of `out_features`, clean;
        `output_raw=True` adds `raw_feature_maps` of the same forward pass.
        """
        # not super(): the mixin before it in line has a forward of its own
        outputs = SOAPModelWrapper.forward(self, pixel_values, output_raw, output_hidden_states, **kwargs)
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        chosen = [self.config.layers[stage] for stage in self.config.out_indices]

        def feature_maps(tokens: Callable[[int], Tensor]) -> tuple[Tensor, ...]:
            return tuple(self.layouts[layer].patches(tokens(layer), size).movedim(-1, 1) for layer in chosen)

        maps = BackboneOutput(
            feature_maps=feature_maps(lambda layer: layer_tokens(outputs, layer)),
            hidden_states=outputs.get("hidden_states") if output_hidden_states else None,
            attentions=outputs.get("attentions"),
        )
        if output_raw:
            raw = {-1: outputs.get("raw_last_hidden_state"), **dict(enumerate(outputs.get("raw_hidden_states") or ()))}
            maps["raw_feature_maps"] = feature_maps(lambda layer: raw[layer])
        return maps.to_tuple() if return_dict is False else maps
