"""Adapters of peft in a backbone: what they compute, merged into plain weights, and where they are written."""

import copy
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..runtime.errors import OutputError, first_sentence


def has_adapter(model: Any) -> bool:
    """Whether an adapter was added to this very model, or loaded with it, which transformers saves by itself."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def without_adapters(backbone: PreTrainedModel, *, merge: bool = True) -> PreTrainedModel:
    """A copy of the backbone without adapters, which computes what it does; itself if there are none.

    Adapters that are disabled compute nothing. Without `merge` all are left out.

    Raises:
        OutputError: an adapter cannot be merged.
    """
    if not adapted_layers(backbone):
        return backbone
    plain = copy.deepcopy(backbone)
    for path, layer in adapted_layers(plain).items():
        above, _, name = path.rpartition(".")
        try:
            setattr(plain.get_submodule(above), name, _plain(layer, merge and _computes(layer)))
        except (AttributeError, ValueError, NotImplementedError, RuntimeError) as error:
            raise OutputError(
                f"The adapter at {path} of {type(backbone).__name__} cannot be merged ({first_sentence(error)}); save "
                "the adapter by itself, or disable it."
            ) from error
    plain._hf_peft_config_loaded = False
    return plain


def has_active_adapter(backbone: nn.Module) -> bool:
    """Whether an adapter takes part in what the backbone computes."""
    return any(_computes(layer) for layer in adapted_layers(backbone).values())


def write_adapter(model: Any, folder: Path, base: str, **kwargs: Any) -> None:
    """Writes the adapter of a head into a folder, as transformers does; it refers to `base`, where the head lies."""
    for adapter in model.peft_config.values():
        adapter.base_model_name_or_path = base
    PreTrainedModel.save_pretrained(model, folder, **kwargs)


def adapted_layers(backbone: nn.Module) -> dict[str, Any]:
    """The layers that hold adapters, and those that an adapter replaces as a whole; none inside another."""
    found: dict[str, Any] = {}
    for path, module in backbone.named_modules():
        is_adapted = hasattr(module, "get_base_layer") or hasattr(module, "original_module")
        if is_adapted and not any(path.startswith(f"{above}.") for above in found):
            found[path] = module
    return found


def _computes(layer: Any) -> bool:
    return not layer.disable_adapters and bool(layer.active_adapters)


def _plain(layer: Any, merge: bool) -> nn.Module:
    """The module that an adapted layer was, or that it is with its adapters merged."""
    if hasattr(layer, "original_module"):
        chosen = [name for name in layer.active_adapters if merge and name in layer.modules_to_save]
        return layer.modules_to_save[chosen[0]] if chosen else layer.original_module
    if hasattr(layer, "unload_and_optionally_merge_module"):
        return layer.unload_and_optionally_merge_module(merge=merge, safe_merge=False, adapter_names=None)
    if merge:
        layer.merge()
    elif layer.merged:
        layer.unmerge()
    return layer.get_base_layer()
