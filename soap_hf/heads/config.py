"""The configuration of a head as the package reads it: from anybody, so that absurd values are refused."""

from dataclasses import fields
from typing import Any

from transformers.configuration_utils import PretrainedConfig

from ..runtime import configuration_soap
from ..runtime.errors import HeadError

SETTINGS = {single.name for single in fields(PretrainedConfig)} | {
    *("_name_or_path", "model_type", "name_or_path", "num_labels", "output_attentions", "per_layer_config"),
    *("rope_scaling", "torch_dtype"),
}
"""What a config file may set of the attributes that every config class has."""

MAX_COUNT, MAX_DEPTH, MAX_VALUES = 1 << 18, 32, 1 << 17
"""Largest number in a backbone's config, as long as which transformers makes lists; levels of it; and values."""


class SOAPConfig(configuration_soap.SOAPConfig):
    """Configuration of a [`SOAPModelWrapper`].

    A head may clean several layers; the lists `layers`, `hidden_sizes`, `ranks`, `layouts` and `components` run in
    parallel.

    Args:
        backbone (`PretrainedConfig` or `dict`, *optional*): the backbone's own configuration.
        backbone_name_or_path (`str`, *optional*): hub id or folder of the backbone; a path that starts with `./` or
            `../` is relative to the head's folder.
        backbone_revision (`str`, *optional*): commit of the backbone that the head was fitted on.
        backbone_dtype (`str`, *optional*): dtype that the head was fitted in and that loading uses, e.g. `"float32"`.
        plain_backbone (`dict`, *optional*): of a module that is no transformers model: its class and sizes, where its
            tokens are, and how it was made ([`~soap_hf.layout.references.BackboneReference`]).
        backbone_digests (`dict[str, str]`): digests of its weights then, by the dtype of their rounding; others warn.
        layers (`list[int]`, defaults to `[-1]`): which tensors are cleaned: -1 is `last_hidden_state`, `i >= 0` is
            `hidden_states[i]`.
        hidden_sizes (`list[int]`): width `D` of the tokens of each layer.
        ranks (`list[int]`): number `k` of directions removed from each layer.
        layouts (`list[dict]`): [`PatchLayout`] of each layer.
        mu (`float` or `"auto"`), tau (`float`), threshold (`float`): arguments of `suppression_weights`.
        components (`list[list[dict]]`): the highest-scoring components of each layer, at least those removed, as
            `SOAPStatistics.table` gives them.
        checks (`list[dict]`): for each layer, what matching between views says of the head: see
            [`~soap_hf.evaluation.check.check_head`]; empty if nothing does.
        out_features (`list[str]`), out_indices (`list[int]`, *optional*): the stages that a [`SOAPBackbone`] gives.
        fit (`dict`): provenance: data set, image counts, image size, seed, package versions.

    Raises:
        HeadError: the lists do not run in parallel or a layer is not allowed.
    """

    plain_backbone: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_types()
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the runtime's, for a config from anybody: a `HeadError` refuses what no head says."""
        _refuse_absurd_values(config_dict)
        return super().from_dict(config_dict, **kwargs)

    def _check_types(self) -> None:
        """Refuses values of other types before anything is done with them."""
        kinds: dict[str, Any] = {"backbone": dict | PretrainedConfig | None, "fit": dict | None, "head_format": int}
        kinds |= {"backbone_name_or_path": str | None, "backbone_revision": str | None}
        right = {name: isinstance(getattr(self, name), kind) for name, kind in kinds.items()}
        lists = {"layers": int, "hidden_sizes": int, "ranks": int, "layouts": dict, "checks": dict, "components": list}
        right |= {name: _is_list_of(kind, getattr(self, name)) for name, kind in lists.items()}
        right["backbone_dtype"] = self.backbone_dtype in (None, "float16", "bfloat16", "float32", "float64")
        right["plain_backbone"] = self.plain_backbone is None or _is_plain(self.plain_backbone)
        if wrong := [name for name, holds in right.items() if not holds]:
            raise HeadError(f"The head's config holds {', '.join(wrong)} of the wrong kind; fetch or fit it again.")


def all_values(tree: Any) -> list[Any]:
    """Every value in nested lists and dicts, these themselves too; a `HeadError` if more or deeper than any head's."""
    found, level = [], [tree]
    for _ in range(MAX_DEPTH):
        found += level
        nested = (value for value in level if isinstance(value, (dict, list, tuple)))
        level = [part for value in nested for part in (value.values() if isinstance(value, dict) else value)]
        if not level:
            return found
        if len(found) + len(level) > MAX_VALUES:
            break
    raise HeadError(f"The head has over {MAX_VALUES} settings or {MAX_DEPTH} levels of them; fetch or fit it again.")


def _refuse_absurd_values(values: dict[str, Any]) -> None:
    """Refuses what no head says, before transformers does what it is told.

    That is: a value that would replace a part of the config class, or name code in a way that is none; too many of
    them, or numbers so large that transformers would count for minutes.
    """
    backbone, auto_map = values.get("backbone"), values.get("auto_map", {})
    names = [*values, *(backbone if isinstance(backbone, dict) else ())]
    foreign = [name for name in names if hasattr(PretrainedConfig, name) and name not in SETTINGS]
    foreign += [name for name in ("attn_implementation", "experts_implementation") if name in values]
    if not isinstance(auto_map, dict) or not all(isinstance(code, str) for code in auto_map.values()):
        foreign.append("auto_map")
    if foreign:
        what = f"{foreign[0]!r}, which no head sets like this"
        raise HeadError(f"The head's config holds {what}; fetch or fit it again.")
    own = {single.name for single in fields(SOAPConfig)} - SETTINGS - {"backbone"}  # checked when the config is made
    all_values({name: values[name] for name in values if name in own})
    others = all_values({name: values[name] for name in values if name not in own})
    if any(isinstance(value, int) and abs(value) > MAX_COUNT for value in others):
        raise HeadError(f"The backbone in the head's config has a number beyond {MAX_COUNT}; fetch or fit it again.")


def _is_plain(values: Any) -> bool:
    """Whether this says of a module what a head keeps of one."""
    kinds: dict[str, Any] = {"architecture": str, "num_parameters": int, "tokens": str | None, "reference": dict}
    kinds |= dict.fromkeys(("num_hidden_layers", "patch_size", "num_channels"), int | None)
    if not isinstance(values, dict) or not all(isinstance(values.get(name), kind) for name, kind in kinds.items()):
        return False
    sides = values.get("image_size") or [1, 1]
    return isinstance(sides, list) and [type(side) for side in sides] == [int, int] and 0 < max(sides) <= MAX_COUNT


def _is_list_of(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)
