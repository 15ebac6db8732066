"""Loading a vision backbone, or the vision tower of a larger model, with every weight from its checkpoint."""

import os
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import logging
from transformers.utils.hub import resolve_revision

from .call_convention import takes_pixels
from .errors import BackboneError, first_sentence

logger = logging.get_logger(__name__)

_CONFIG_KWARGS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def load_backbone(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """Loads a vision backbone by hub id or folder, with every weight from the checkpoint.

    Of a composite model (CLIP, SigLIP, BLIP-2, …) the vision tower is taken.

    Args:
        name_or_path (`str`): hub id or folder.
        kwargs: handed to `AutoModel.from_pretrained` (`revision`, `dtype`, `device_map`, `token`, …).

    Returns:
        The backbone in evaluation mode. A pooler that the checkpoint lacks is taken out, so that `pooler_output` is
        `None` rather than made by random weights.

    Raises:
        BackboneError: it cannot be found or loaded, takes no images, or the checkpoint lacks weights.
    """
    reach = {name: value for name, value in kwargs.items() if name in _CONFIG_KWARGS}
    if os.path.isabs(name_or_path) and not os.path.isdir(name_or_path):
        raise BackboneError(f"There is no folder {name_or_path} with a backbone; if it moved, pass backbone=….")
    try:
        config = AutoConfig.from_pretrained(name_or_path, **reach)
        _refuse_head(config, name_or_path)
        inner = tower_config(config)
        if inner is not None and type(inner) in MODEL_MAPPING:
            tower, missing = _load(name_or_path, AutoModel, config=inner, **kwargs)
            if not [key for key in missing if not _is_pooler(key)]:
                return _finish(tower, missing, name_or_path)
        backbone, missing = _load(name_or_path, _model_class(config), **kwargs)
    except BackboneError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        raise BackboneError(
            f"Backbone {name_or_path!r} cannot be loaded ({first_sentence(error)}); give the hub id or the folder of "
            "a transformers vision model."
        ) from error
    if inner is not None:
        path, tower = _find_tower(backbone)
        missing = [key.removeprefix(f"{path}.") for key in missing if key.startswith(f"{path}.")]
        return _finish(tower, missing, name_or_path)
    return _finish(backbone, missing, name_or_path)


def resolve_commit(name_or_path: str, revision: str | None, **reach: Any) -> str | None:
    """The commit that a branch or tag of a hub repository stands at now.

    Args:
        name_or_path (`str`): hub id; for a folder the revision comes back as it is.
        revision (`str`, *optional*): branch, tag or commit; default: the main branch.
        reach: `token`, `cache_dir`, `local_files_only`.

    Returns:
        40 hexadecimal digits, or `revision` if the Hub is out of reach.
    """
    how = {name: reach[name] for name in ("token", "cache_dir", "local_files_only") if name in reach}
    return getattr(resolve_revision(name_or_path, revision, **how), "resolved", revision)


def bare_backbone(model: nn.Module) -> PreTrainedModel:
    """The part of a live model that returns tokens: a task model's base model, a composite model's vision tower.

    Raises:
        BackboneError: not a transformers vision model.
    """
    if not isinstance(model, PreTrainedModel):
        raise BackboneError(
            f"A backbone must be a transformers model, a hub id or a folder, not {type(model).__name__}."
        )
    _refuse_head(model.config, type(model).__name__)
    if tower_config(model.config) is not None:
        return _find_tower(model)[1]
    if isinstance(model, BackboneMixin) and not is_automodel(model):
        raise BackboneError(
            f"{type(model).__name__} gives feature maps of its own; pass the model that AutoModel gives for "
            f"{model.config.model_type} instead."
        )
    # not every base model is one that AutoModel knows: DINOv3's is an encoder without embeddings
    is_task_model = not is_automodel(model) and is_automodel(model.base_model)
    backbone = model.base_model if is_task_model else model
    _require_images(backbone, type(backbone).__name__)
    return backbone


def _refuse_head(config: PretrainedConfig, name: str) -> None:
    if config.model_type == "soap":
        raise BackboneError(f"{name} is a SOAP head, not a backbone; give the backbone that it was fitted on.")


def weight_samples(backbone: nn.Module) -> Tensor:
    """A few values of every weight, float32 on the CPU, which show that an optimiser has stepped on them."""
    # not autograd's counts of writes in place: fused optimisers, the Trainer's default, do not raise them
    known = (parameter.detach() for parameter in backbone.parameters() if not parameter.is_meta)
    return torch.cat([torch.zeros(0), *(parameter.flatten()[:8].float().cpu() for parameter in known)])


def differ(first: Tensor, second: Tensor) -> bool:
    """Whether samples of weights differ by more than a change of dtype and back makes them."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    return first.shape != second.shape or not any(torch.equal(first.to(dtype).float(), second) for dtype in dtypes)


def random_backbone(config: PretrainedConfig) -> PreTrainedModel:
    """A backbone of this configuration with random weights, as `from_config` makes it."""
    known = _model_class(config)
    return AutoModel.from_config(config) if known is AutoModel else known._from_config(config)


def _model_class(config: PretrainedConfig) -> Any:
    """`AutoModel`, or for a vision tower that it does not know the class of transformers that wrote the checkpoint."""
    home = type(config).__module__
    if type(config) in MODEL_MAPPING or not home.startswith("transformers.models."):
        return AutoModel
    module = import_module(home.replace(".configuration_", ".modeling_"))
    found = getattr(module, (config.architectures or [""])[0], None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else AutoModel


def _load(name_or_path: str, model_class: Any, **kwargs: Any) -> tuple[PreTrainedModel, list[str]]:
    """A model and the keys that its checkpoint lacks."""
    model, info = model_class.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    return model, sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])


def _finish(backbone: PreTrainedModel, missing: list[str], name: str) -> PreTrainedModel:
    """The backbone ready for use, if it takes images and its checkpoint lacks nothing but a pooler."""
    _require_images(backbone, name)
    if missing and all(_is_pooler(key) for key in missing):
        backbone.pooler = None
    elif missing:
        raise BackboneError(
            f"The checkpoint {name!r} lacks weights of {type(backbone).__name__} (e.g. {missing[0]}; {len(missing)} "
            "in all), which would be random; load the right model class and pass the live model."
        )
    return backbone.eval()


def _is_pooler(key: str) -> bool:
    return key.startswith("pooler.")


def tower_config(config: PretrainedConfig) -> PretrainedConfig | None:
    """The configuration of a composite model's vision tower; `None` for a plain vision model."""
    found = (getattr(config, name, None) for name in ("vision_config", "image_config", "encoder"))
    return next((single for single in found if isinstance(single, PretrainedConfig)), None)


def _find_tower(model: PreTrainedModel) -> tuple[str, PreTrainedModel]:
    """Path and module of a composite model's vision tower.

    Raises:
        BackboneError: there is none that takes images.
    """
    own = ("image_model", "image_encoder", "encoder")
    named = (getattr(model, name) for name in own if isinstance(getattr(model, name, None), PreTrainedModel))
    tower = next(named, None) or model.get_encoder(modality="image")
    path = next((name for name, module in model.named_modules() if module is tower), "")
    if tower is model or not isinstance(tower, PreTrainedModel):
        raise BackboneError(
            f"The vision tower of {type(model).__name__} ({model.config.model_type}) was not found; pass it as a live "
            "model, e.g. model.vision_model."
        )
    _require_images(tower, f"The vision tower of {type(model).__name__}")
    return path, tower


def is_automodel(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    known = MODEL_MAPPING.get(type(config), ())
    return type(model) in (known if isinstance(known, (list, tuple)) else (known,))


def _require_images(backbone: PreTrainedModel, name: str) -> None:
    if not takes_pixels(backbone):
        raise BackboneError(
            f"{name} ({backbone.config.model_type}) is not a vision backbone: its forward takes "
            "no pixels, or text beside them."
        )
