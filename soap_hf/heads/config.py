"""The configuration of a head as the package reads it: from anybody, so that absurd values are refused."""

from dataclasses import fields
from typing import Any

from transformers.configuration_utils import PretrainedConfig

from ..runtime import configuration_soap
from ..runtime.errors import HeadError
from .provenance import MAX_COUNT, SOAP, all_values, has_large_number, wrong_kinds

SETTINGS = {single.name for single in fields(PretrainedConfig)} | {
    *("_name_or_path", "model_type", "name_or_path", "num_labels", "output_attentions", "per_layer_config"),
    *("rope_scaling", "torch_dtype"),
}
"""What a config file may set of the attributes that every config class has."""


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
        base_model (`str`, *optional*), base_model_revision (`str`, *optional*): hub id and commit that a backbone had
            which was saved with the head.
        backbone_digests (`dict[str, str]`): digests of its weights then, by the dtype of their rounding; others warn.
        layers (`list[int]`, defaults to `[-1]`): which tensors are cleaned: -1 is `last_hidden_state`, `i >= 0` is
            `hidden_states[i]`.
        hidden_sizes (`list[int]`): width `D` of the tokens of each layer.
        ranks (`list[int]`): number `k` of directions removed from each layer.
        layouts (`list[dict]`): [`PatchLayout`] of each layer.
        method (`str`, defaults to `"soap"`): what is removed: SOAP's directions, or those of a baseline,
            `"zero-image"` or `"top-pc"` ([`~soap_hf.evaluation.methods.as_baseline`]).
        mu (`float` or `"auto"`), tau (`float`), threshold (`float`): arguments of `suppression_weights`; of a baseline
            those of the SOAP that it was before.
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
    base_model: str | None = None
    base_model_revision: str | None = None
    method: str = SOAP

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
        wrong = wrong_kinds(self)
        if not isinstance(self.backbone, dict | PretrainedConfig | None):
            wrong = ["backbone", *wrong]
        if wrong:
            raise HeadError(f"The head's config holds {', '.join(wrong)} of the wrong kind; fetch or fit it again.")


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
    if has_large_number({name: values[name] for name in values if name not in own}):
        raise HeadError(f"The backbone in the head's config has a number beyond {MAX_COUNT}; fetch or fit it again.")
