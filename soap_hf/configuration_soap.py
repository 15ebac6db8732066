"""Configuration of a SOAP head: which backbone it belongs to, what it removes, and how it was fitted."""

import math
from dataclasses import field
from typing import Any, ClassVar

from transformers import AutoConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PretrainedConfig, SubConfigSpec

from .errors import HeadError

HEAD_FORMAT = 1
"""Version of the head's files; raised when an older package could not read them."""


class SOAPConfig(BackboneConfigMixin, PretrainedConfig):
    """Configuration of a [`SOAPModelWrapper`].

    A head may clean several layers; the lists `layers`, `hidden_sizes`, `ranks`, `layouts` and `components` run in
    parallel.

    Args:
        backbone (`PretrainedConfig` or `dict`, *optional*): the backbone's own configuration.
        backbone_name_or_path (`str`, *optional*): hub id or folder of the backbone; a path that starts with `./` or
            `../` is relative to the head's folder.
        backbone_revision (`str`, *optional*): commit of the backbone that the head was fitted on.
        backbone_dtype (`str`, *optional*): dtype that the head was fitted in and that loading uses, e.g. `"float32"`.
        layers (`list[int]`, defaults to `[-1]`): which tensors are cleaned: -1 is `last_hidden_state`, `i >= 0` is
            `hidden_states[i]`.
        hidden_sizes (`list[int]`): width `D` of the tokens of each layer.
        ranks (`list[int]`): number `k` of directions removed from each layer.
        layouts (`list[dict]`): [`PatchLayout`] of each layer.
        mu (`float` or `"auto"`), tau (`float`), threshold (`float`): arguments of `suppression_weights`.
        components (`list[list[dict]]`): the highest-scoring components of each layer, at least those removed, as
            `SOAPStatistics.table` gives them.
        out_features (`list[str]`), out_indices (`list[int]`, *optional*): the stages that a [`SOAPBackbone`] gives.
        fit (`dict`): provenance: data set, image counts, image size, seed, package versions.

    Raises:
        HeadError: the lists do not run in parallel or a layer is not allowed.
    """

    model_type = "soap"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "backbone": SubConfigSpec(AutoConfig, model_type="vit", optional=True)
    }

    backbone: dict[str, Any] | PretrainedConfig | None = None
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    backbone_dtype: str | None = None
    layers: list[int] = field(default_factory=lambda: [-1])
    hidden_sizes: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    layouts: list[dict[str, Any]] = field(default_factory=list)
    mu: float | int | str = "auto"
    tau: float = 0.05
    threshold: float = 0.75
    components: list[list[dict[str, Any]]] = field(default_factory=list)
    fit: dict[str, Any] | None = None
    head_format: int = HEAD_FORMAT

    def __post_init__(self, **kwargs: Any) -> None:
        stages = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        self._check_types()
        super().__post_init__(**kwargs)
        if self.head_format > HEAD_FORMAT:
            raise HeadError(f"This head has format {self.head_format}, newer than {HEAD_FORMAT}; upgrade soap-hf.")
        numbers: dict[str, Any] = {"tau": self.tau, "threshold": self.threshold} | (
            {} if self.mu == "auto" else {"mu": self.mu}
        )
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in numbers.values()):
            raise HeadError(f"tau, threshold and mu of a head must be finite numbers, but are {numbers}.")
        if len(set(self.layers)) != len(self.layers) or any(layer < -1 for layer in self.layers):
            raise HeadError(f"layers must be different numbers from -1 upwards, not {self.layers}.")
        lengths = {len(self.layers), len(self.hidden_sizes), len(self.ranks), len(self.layouts)}
        if self.hidden_sizes and lengths != {len(self.layers)}:
            raise HeadError(
                f"A head of {len(self.layers)} layers needs as many hidden_sizes, ranks and layouts, not "
                f"{len(self.hidden_sizes)}, {len(self.ranks)} and {len(self.layouts)}."
            )
        sizes = list(zip(self.hidden_sizes, self.ranks, strict=False))
        if any(not 0 <= rank <= size <= MAX_HIDDEN_SIZE or rank * size > MAX_BASIS for size, rank in sizes):
            raise HeadError(f"Each rank must lie between 0 and its hidden size, not (hidden size, rank) = {sizes}.")

        self._out_features, self._out_indices = None, None
        if any(stages):
            self.set_output_features_output_indices(*stages)

    def _check_types(self) -> None:
        """Refuses values of other types before anything is done with them."""
        kinds = {"layers": int, "hidden_sizes": int, "ranks": int, "layouts": dict}
        wrong = [name for name, kind in kinds.items() if not _is_list_of(kind, getattr(self, name))]
        rows = self.components if isinstance(self.components, list) else [None]
        if not all(_is_list_of(dict, single) and all(set(row) >= COMPONENT_KEYS for row in single) for single in rows):
            wrong.append("components")
        wrong += ["head_format"] * (not isinstance(self.head_format, int))
        wrong += ["backbone"] * (not isinstance(self.backbone, (dict, PretrainedConfig, type(None))))
        if wrong:
            raise HeadError(f"The head's config holds {', '.join(wrong)} of the wrong kind; fetch or fit it anew.")

    @property
    def stage_names(self) -> list[str]:
        """Names of the layers as stages of a [`SOAPBackbone`]."""
        return ["last" if layer == -1 else f"layer{layer}" for layer in self.layers]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but a live model or a path given as `backbone` is left for the model's loading."""
        given = kwargs.get("backbone")
        if given is None or isinstance(given, (dict, PretrainedConfig)):
            return super().from_dict(config_dict, **kwargs)
        loaded = super().from_dict(config_dict, **{name: kwargs[name] for name in kwargs if name != "backbone"})
        return (loaded[0], {**loaded[1], "backbone": given}) if kwargs.get("return_unused_kwargs") else loaded

    @property
    def hidden_size(self) -> int | None:
        """Width of the tokens of the last layer listed."""
        return self.hidden_sizes[-1] if self.hidden_sizes else None


def _is_list_of(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


COMPONENT_KEYS = {"rank", "component", "score", "standard_error", "variance_share", "weight"}
"""What is told of a component."""

MAX_BASIS = 1 << 26
"""Numbers in a basis; beyond this a config is malformed, and building it would fill the memory."""

MAX_HIDDEN_SIZE = 1 << 20
"""Widths beyond this are a malformed config, not a backbone."""
