"""Configuration of a SOAP head: which backbone it belongs to, what it removes, and how it was fitted."""

import math
from dataclasses import field, fields
from typing import Any, ClassVar

from transformers import AutoConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PretrainedConfig, SubConfigSpec

from .errors import HeadError, first_sentence

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
        if not all(map(_is_finite, numbers.values())):
            raise HeadError(f"tau, threshold and mu of a head must be finite numbers, but are {numbers}.")
        if len(set(self.layers)) != len(self.layers) or any(layer < -1 for layer in self.layers):
            raise HeadError(f"layers must be different numbers from -1 upwards, not {self.layers}.")
        lengths = {len(self.layers), len(self.hidden_sizes), len(self.ranks), len(self.layouts)}
        if self.hidden_sizes and lengths != {len(self.layers)}:
            raise HeadError(
                f"A head of {len(self.layers)} layers needs as many hidden_sizes, ranks and layouts, not "
                f"{len(self.hidden_sizes)}, {len(self.ranks)} and {len(self.layouts)}."
            )
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

    def _check_types(self) -> None:
        """Refuses values of other types before anything is done with them."""
        kinds: dict[str, Any] = {
            "backbone": (dict, PretrainedConfig, type(None)),
            "backbone_name_or_path": (str, type(None)),
            "backbone_revision": (str, type(None)),
            "head_format": int,
        }
        numbers = ("layers", "hidden_sizes", "ranks")
        right = {
            **{name: isinstance(getattr(self, name), kind) for name, kind in kinds.items()},
            **{name: _is_list_of(int, getattr(self, name)) for name in numbers},
            "layouts": _is_list_of(dict, self.layouts),
            "components": _is_list_of(list, self.components) and all(map(_are_components, self.components)),
            "backbone_dtype": self.backbone_dtype in (None, *BACKBONE_DTYPES),
            "fit": self.fit is None or _is_provenance(self.fit),
        }
        wrong = [name for name, holds in right.items() if not holds]
        if wrong:
            raise HeadError(f"The head's config holds {', '.join(wrong)} of the wrong kind; fetch or fit it anew.")

    @property
    def stage_names(self) -> list[str]:
        """Names of the layers as stages of a [`SOAPBackbone`]."""
        return ["last" if layer == -1 else f"layer{layer}" for layer in self.layers]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but what says which backbone to load is left for the model's loading.

        Raises:
            HeadError: the values, which may come from anybody, make no configuration.
        """
        _refuse_absurd_values(config_dict)
        given = {name: kwargs.pop(name) for name in ("backbone", "backbone_revision") if name in kwargs}
        if isinstance(given.get("backbone"), (dict, PretrainedConfig)):
            kwargs["backbone"] = given.pop("backbone")
        try:
            loaded = super().from_dict(config_dict, **kwargs)
        except HeadError:
            raise
        except Exception as error:  # transformers raises whatever a value of another kind leads to
            raise HeadError(
                f"The head's config is malformed ({first_sentence(error)}); fetch or fit it anew."
            ) from error
        return (loaded[0], {**loaded[1], **given}) if kwargs.get("return_unused_kwargs") else loaded

    @property
    def hidden_size(self) -> int | None:
        """Width of the tokens of the last layer listed."""
        return self.hidden_sizes[-1] if self.hidden_sizes else None


def _is_list_of(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _are_components(rows: Any) -> bool:
    """Whether these are components as `SOAPStatistics.table` gives them, one at least."""
    return (
        bool(rows)
        and _is_list_of(dict, rows)
        and all(set(row) >= COMPONENT_KEYS and all(map(_is_finite, row.values())) for row in rows)
    )


def _is_provenance(fit: Any) -> bool:
    """Whether this tells what a report and a card say of a fit."""
    return (
        isinstance(fit, dict)
        and set(fit) >= FIT_KEYS
        and _is_list_of(int, fit["image_size"])
        and len(fit["image_size"]) == 2
        and isinstance(fit["dataset"], str)
        and isinstance(fit["versions"], dict)
        and "soap_hf" in fit["versions"]
    )


def _refuse_absurd_values(values: dict[str, Any]) -> None:
    """Refuses what no head says, before transformers does what it is told.

    Raises:
        HeadError: a value would take the place of a part of the config class, choose the code of the attention or name
            code in a way that is none; or there are too many, or numbers so large that transformers would count for
            minutes.
    """
    backbone, auto_map = values.get("backbone"), values.get("auto_map", {})
    names = [*values, *(backbone if isinstance(backbone, dict) else ())]
    foreign = [name for name in names if hasattr(PretrainedConfig, name) and name not in SETTINGS]
    foreign += [name for name in ("attn_implementation", "experts_implementation") if name in values]
    if not isinstance(auto_map, dict) or not all(isinstance(code, str) for code in auto_map.values()):
        foreign.append("auto_map")
    if foreign:
        raise HeadError(f"The head's config holds {foreign[0]!r}, which no head sets like this; fetch or fit it anew.")
    own = SOAPConfig.__annotations__.keys() - {"backbone"}  # these are checked when the config is made
    all_values({name: values[name] for name in values if name in own})
    others = all_values({name: values[name] for name in values if name not in own})
    if any(isinstance(value, int) and abs(value) > MAX_COUNT for value in others):
        raise HeadError(f"The backbone in the head's config has a number beyond {MAX_COUNT}; fetch or fit it anew.")


def all_values(tree: Any) -> list[Any]:
    """Every value in nested lists and dicts, these themselves among them.

    Raises:
        HeadError: they are more, or nested more deeply, than in any file of a head.
    """
    found, level = [], [tree]
    for _ in range(MAX_DEPTH):
        found += level
        nested = (value.values() if isinstance(value, dict) else value for value in level if _has_parts(value))
        level = [part for parts in nested for part in parts]
        if not level:
            return found
        if len(found) + len(level) > MAX_VALUES:
            break
    raise HeadError(
        f"The head has more than {MAX_VALUES} settings or {MAX_DEPTH} levels of them; fetch or fit it anew."
    )


def _has_parts(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple))


COMPONENT_KEYS = {"rank", "component", "score", "standard_error", "variance_share", "weight"}
"""What is told of a component."""

FIT_KEYS = {"dataset", "image_size", "num_bad_images", "num_images", "num_synthetic", "seed", "versions"}
"""What is told of a fit."""

BACKBONE_DTYPES = ("float16", "bfloat16", "float32", "float64")

SETTINGS = {single.name for single in fields(PretrainedConfig)} | {
    "_name_or_path",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "rope_scaling",
    "torch_dtype",
}
"""What a config file may set of the attributes that every config class has."""

MAX_BASES = 1 << 22
"""Numbers in the bases of a head; beyond this a config is malformed, and building it would fill the memory."""

MAX_HIDDEN_SIZE = 1 << 20
"""Widths beyond this are a malformed config, not a backbone."""

MAX_COUNT = 1 << 18
"""Whole numbers beyond this in a backbone's config: transformers makes lists as long as some of them say."""

MAX_DEPTH = 32
MAX_VALUES = 1 << 17
"""Configs of transformers have six levels, and twenty thousand classes at most."""
