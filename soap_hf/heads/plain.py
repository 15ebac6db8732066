"""A head whose backbone is a module of any library: put on it again, made anew or given, and checked to fit."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..layout.backbone import OpenedBackbone, as_dtype, is_plain
from ..layout.detection import PatchLayout
from ..layout.plain import PlainBackbone, name_of
from ..layout.probing import CALL_ERRORS, evaluation_mode, probe_size
from ..layout.references import BackboneReference
from ..runtime.errors import BackboneError, HeadError, LayoutError
from ..runtime.vision_backbone import weight_digests
from .config import SOAPConfig

logger = logging.get_logger(__name__)

SIZES = {"num_hidden_layers": "depth", "patch_size": "patch size"}
"""What two backbones must share beside the width, as far as both say it."""


def opened_for_head(config: SOAPConfig, given: Any, kwargs: dict[str, Any], head: str) -> OpenedBackbone | None:
    """The module under a head: `given` live or by reference, else made as the config says.

    `None` if it is a model of transformers instead. `kwargs` are the options of a loading; `tokens` is taken out.

    Raises:
        BackboneError: it cannot be made, or nobody has said that code may run.
        HeadError: the head needs a module that is not given.
    """
    tokens, plain = kwargs.pop("tokens", None), config.plain_backbone
    if isinstance(given, nn.Module):
        if not is_plain(given) and tokens is None:
            return None
        return OpenedBackbone(given, tokens=_tokens(config, tokens), size=fitted_size(config))
    if given is not None and given != config.backbone_name_or_path:
        reference = BackboneReference.parse(str(given))
    else:
        reference = None if plain is None else BackboneReference.from_dict(plain["reference"])
    if reference is None:
        return None
    if plain is not None and reference.kind == "live":
        raise HeadError(
            f"The head {head!r} was fitted on a live module, {plain['architecture']} of {plain['num_parameters']} "
            "parameters: make that one and pass it, SOAPModelWrapper.from_pretrained(head, backbone=module)."
        )
    chosen = {name: value for name, value in kwargs.items() if value is not None}
    trusted = chosen.pop("trust_remote_code", None)
    dtype = chosen.pop("dtype", None) or chosen.pop("torch_dtype", None) or "auto"
    dtype = config.backbone_dtype if dtype == "auto" else dtype
    if chosen:
        raise BackboneError(
            f"{', '.join(sorted(chosen))} load a model of transformers, but {reference} is none; leave it out, or "
            "make the module yourself and pass it as backbone=…."
        )
    module = reference.make(trusted).to(dtype and as_dtype(dtype))
    return OpenedBackbone(module, tokens=_tokens(config, tokens), size=fitted_size(config), reference=reference)


def _tokens(config: SOAPConfig, given: Any) -> Any:
    """Where the tokens are: as given, else as the head says; of a head of transformers they are found."""
    if given is not None or config.plain_backbone is None:
        return given
    if config.plain_backbone["tokens"] is None:
        raise HeadError("The tokens of this head were made by a function: pass it again, as tokens=….")
    return config.plain_backbone["tokens"]


def fitted_size(config: SOAPConfig) -> tuple[int, int] | None:
    """`(height, width)` at which the head was fitted, else native."""
    sides = (config.fit or {}).get("image_size") or (config.plain_backbone or {}).get("image_size")
    return (sides[0], sides[1]) if sides else None


def put_on_module(config: SOAPConfig, opened: OpenedBackbone) -> PreTrainedModel:
    """Notes in a head's config that it lies on a module, which must fit: in width, depth and patch size.

    Raises:
        HeadError: it does not.
        BackboneError: the module gives no patch tokens.
    """
    live, stored = opened.model, config.plain_backbone
    check_sizes(stored or config.backbone, live)
    size = fitted_size(config) or probe_size(live)
    tokens = _tokens_of_one(live, size)
    if stored is None:  # fitted on a model of transformers, whose tokens may come with others
        config.layouts = [opened.layout(-1, size).to_dict()]
    layout = PatchLayout.from_dict(config.layouts[0])
    try:
        width = layout.patches(tokens, size).shape[-1]
    except LayoutError as error:
        raise HeadError(f"The tokens of {name_of(live)} do not lie as the head expects: {error}") from error
    if width != config.hidden_sizes[0]:
        raise HeadError(
            f"The head is for tokens of width {config.hidden_sizes[0]}, but those of {name_of(live)} have width "
            f"{width}; load the head with the backbone it was fitted on, or fit a new head."
        )
    if stored is None:
        config.backbone_digests = weight_digests(live)  # those of another order of the same weights say nothing
        config.backbone, config.backbone_revision = None, None
    config.plain_backbone, config.backbone_name_or_path = opened.plain, opened.name_or_path
    if stored is not None and (opened.reference or BackboneReference()).kind == "live":
        # a live copy of what can be made anew
        config.plain_backbone = {**(opened.plain or {}), "reference": stored["reference"]}
        reference = BackboneReference.from_dict(stored["reference"])
        config.backbone_name_or_path = None if reference.kind == "live" else str(reference)
    return live


@torch.no_grad()
def _tokens_of_one(live: PreTrainedModel, size: tuple[int, int]) -> Any:
    parameter = next(live.parameters())
    pixels = torch.zeros(1, live.config.num_channels or 3, *size, device=parameter.device, dtype=parameter.dtype)
    with evaluation_mode(live):
        try:
            return live(pixels).last_hidden_state
        except BackboneError:
            raise
        except CALL_ERRORS as error:
            raise HeadError(
                f"{name_of(live)} cannot take images of {size[0]} x {size[1]} pixels, which the head was fitted on; "
                "load the head with the backbone it was fitted on."
            ) from error


def put_on_transformers(config: SOAPConfig, live: PreTrainedModel, fresh_config: Any) -> PreTrainedModel:
    """Notes in the config of a head of a module that it lies on a model of transformers, whose tokens must fit.

    Raises:
        HeadError: they do not; `LayoutError` if they are not found.
    """
    stored = config.plain_backbone or {}
    check_sizes(stored, live)
    warn_if_other_tokens(config, name_of(live))
    opened = OpenedBackbone(live)
    layouts, widths = opened.layouts([-1], fitted_size(config) if opened.native_size is None else None)
    layout, width = layouts[-1], widths[-1]
    if width != config.hidden_sizes[0]:
        raise HeadError(
            f"The head is for tokens of width {config.hidden_sizes[0]}, but those of {name_of(live)} have width "
            f"{width}; fit a head for this backbone."
        )
    config.layouts, config.plain_backbone = [layout.to_dict()], None
    config.backbone, config.backbone_digests = fresh_config, weight_digests(live)
    config.backbone_name_or_path, config.backbone_revision = live.config.name_or_path or None, None
    return live


def warn_if_other_tokens(config: SOAPConfig, name: str) -> None:
    """Says so if a head of a module was fitted on tokens that a model of transformers may have elsewhere."""
    tokens = (config.plain_backbone or {}).get("tokens")
    if tokens is None or tokens.rpartition(".")[2].partition(":")[0].isdecimal():
        what = "what a function made" if tokens is None else f"the output of {tokens}"
        logger.warning(
            f"The head was fitted on {what}, and is put on last_hidden_state of {name}: see that it is the same."
        )


def check_sizes(stored: Any, live: PreTrainedModel) -> None:
    """Refuses another depth or patch size, as far as both are known."""
    for name, words in SIZES.items() if stored is not None else ():
        here = stored.get(name) if isinstance(stored, dict) else getattr(stored, name, None)
        there = getattr(live.config, name, None)
        if None not in (here, there) and here != there:
            raise HeadError(
                f"The head was fitted on a backbone of {words} {here}, but {name_of(live)} has {there}; load the head "
                "with the backbone it was fitted on, or fit a new head."
            )


def is_on_module(model: Any) -> bool:
    """Whether a head lies on a module of another library than transformers."""
    return isinstance(model.backbone, PlainBackbone)
