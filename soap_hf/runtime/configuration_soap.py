"""Configuration of a SOAP head: which backbone it belongs to, what it removes, and how it was fitted."""

import math
from dataclasses import field
from typing import Any, ClassVar

from .errors import HeadError, first_sentence  # first, since it refuses what is too old for the rest

# isort: split
from transformers import AutoConfig, configuration_utils
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PretrainedConfig

SubConfigSpec: Any = getattr(configuration_utils, "SubConfigSpec", None)

HEAD_FORMAT = 1
"""Version of the head's files; raised when an older package could not read them."""

MAX_BASES, MAX_HIDDEN_SIZE = 1 << 22, 1 << 20
"""Numbers in the bases of a head, and widths: beyond these a config is malformed, and would fill the memory."""


class SOAPConfig(BackboneConfigMixin, PretrainedConfig):
    """Configuration of a head: its backbone, and for each layer, in parallel lists, what is removed and from where.

    The package's class of the same name says what each value means, and refuses absurd ones.
    """

    model_type = "soap"
    if SubConfigSpec is None:  # before transformers 5.20
        sub_configs: ClassVar[dict[str, Any]] = {"backbone": AutoConfig}
    else:
        sub_configs_defaults: ClassVar[Any] = {"backbone": SubConfigSpec(AutoConfig, model_type="vit", optional=True)}

    backbone: dict[str, Any] | PretrainedConfig | None = None
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    backbone_dtype: str | None = None
    backbone_digests: dict[str, str] = field(default_factory=dict)
    layers: list[int] = field(default_factory=lambda: [-1])
    hidden_sizes: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    layouts: list[dict[str, Any]] = field(default_factory=list)
    mu: float | int | str = "auto"
    tau: float = 0.05
    threshold: float = 0.75
    components: list[list[dict[str, Any]]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    fit: dict[str, Any] | None = None
    head_format: int = HEAD_FORMAT

    def __post_init__(self, **kwargs: Any) -> None:
        stages = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if isinstance(self.backbone, dict):
            self.backbone = AutoConfig.for_model(**{"model_type": "vit", **self.backbone})
        super().__post_init__(**kwargs)
        if self.head_format > HEAD_FORMAT:
            raise HeadError(f"This head has format {self.head_format}, newer than {HEAD_FORMAT}; upgrade soap-hf.")
        numbers = {"tau": self.tau, "threshold": self.threshold} | ({} if self.mu == "auto" else {"mu": self.mu})
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in numbers.values()):
            raise HeadError(f"tau, threshold and mu of a head must be finite numbers, but are {numbers}.")
        if not all(isinstance(value, str) for value in dict(self.backbone_digests).values()):
            raise HeadError(f"backbone_digests of a head must be texts by dtype, not {self.backbone_digests}.")
        if len(set(self.layers)) != len(self.layers) or any(layer < -1 for layer in self.layers):
            raise HeadError(f"layers must be different numbers from -1 upwards, not {self.layers}.")
        counts = [len(self.hidden_sizes), len(self.ranks), len(self.layouts)]
        if self.hidden_sizes and set(counts) != {len(self.layers)}:
            what = f"as many hidden_sizes, ranks and layouts, not {', '.join(map(str, counts))}"
            raise HeadError(f"A head of {len(self.layers)} layers needs {what}.")
        if self.components and len(self.components) != len(self.layers):
            raise HeadError(f"A head of {len(self.layers)} layers has components of {len(self.components)}.")
        sizes = list(zip(self.hidden_sizes, self.ranks, strict=False))
        if any(not 0 <= rank <= size <= MAX_HIDDEN_SIZE for size, rank in sizes):
            raise HeadError(f"Each rank must lie between 0 and its hidden size, not (hidden size, rank) = {sizes}.")
        if (total := sum(size * rank for size, rank in sizes)) > MAX_BASES:
            raise HeadError(f"The bases of a head hold at most {MAX_BASES} numbers, not {total}; remove fewer.")
        self._out_features, self._out_indices = None, None
        if any(stages):
            self.set_output_features_output_indices(*stages)

    @property
    def stage_names(self) -> list[str]:
        """Names of the layers as stages of a [`SOAPBackbone`]."""
        return ["last" if layer == -1 else f"layer{layer}" for layer in self.layers]

    @property
    def hidden_size(self) -> int | None:
        """Width of the tokens of the last layer listed."""
        return self.hidden_sizes[-1] if self.hidden_sizes else None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but what says which backbone to load is left for the model's loading."""
        given = {name: kwargs.pop(name) for name in ("backbone", "backbone_revision") if name in kwargs}
        if isinstance(given.get("backbone"), (dict, PretrainedConfig)):
            kwargs["backbone"] = given.pop("backbone")
        try:
            loaded = super().from_dict(config_dict, **kwargs)
        except HeadError:
            raise
        except Exception as error:  # transformers raises whatever a value of another kind leads to
            what = first_sentence(error)
            raise HeadError(f"The head's config is malformed ({what}); fetch or fit it again.") from error
        return (loaded[0], {**loaded[1], **given}) if kwargs.get("return_unused_kwargs") else loaded
