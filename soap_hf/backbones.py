"""Loading a vision backbone and calling it so that every patch comes out, in raster order, at any size it can take."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import logging

from .errors import BackboneError

logger = logging.get_logger(__name__)


def load_backbone(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """Loads a vision backbone by hub id or folder, with every weight from the checkpoint.

    Args:
        name_or_path (`str`): hub id or folder.
        kwargs: handed to `AutoModel.from_pretrained` (`revision`, `dtype`, `device_map`, `token`, …).

    Returns:
        The backbone in evaluation mode. A pooler that the checkpoint lacks is taken out, so that `pooler_output` is
        `None` rather than made by random weights.

    Raises:
        BackboneError: it cannot be found or loaded, takes no images, or the checkpoint lacks weights.
    """
    try:
        backbone, info = AutoModel.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise BackboneError(
            f"Backbone {name_or_path!r} cannot be loaded ({first_sentence(error)}); give the hub id or the folder of "
            "a transformers vision model."
        ) from error
    _require_images(backbone, name_or_path)
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing and all(key.startswith("pooler.") for key in missing):
        backbone.pooler = None
    elif missing:
        raise BackboneError(
            f"The checkpoint {name_or_path!r} lacks weights of {type(backbone).__name__} (e.g. {missing[0]}; "
            f"{len(missing)} in all), which would be random; load the right model class and pass the live model."
        )
    return backbone.eval()


def bare_backbone(model: nn.Module) -> PreTrainedModel:
    """The part of a live model that returns tokens: a task model's base model, or the model itself.

    Raises:
        BackboneError: not a transformers vision model.
    """
    if not isinstance(model, PreTrainedModel):
        raise BackboneError(
            f"A backbone must be a transformers model, a hub id or a folder, not {type(model).__name__}."
        )
    # not every base model is one that AutoModel knows: DINOv3's is an encoder without embeddings
    is_task_model = not _is_automodel(model) and _is_automodel(model.base_model)
    backbone = model.base_model if is_task_model else model
    _require_images(backbone, type(backbone).__name__)
    return backbone


def _is_automodel(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    known = MODEL_MAPPING.get(type(config), ())
    return type(model) in (known if isinstance(known, (list, tuple)) else (known,))


def _require_images(backbone: PreTrainedModel, name: str) -> None:
    if backbone.main_input_name != "pixel_values":
        raise BackboneError(
            f"{name} ({backbone.config.model_type}) is not a vision backbone: its main input is "
            f"{backbone.main_input_name!r}, not 'pixel_values'."
        )


def native_image_size(config: PretrainedConfig) -> tuple[int, int] | None:
    """`(height, width)` the backbone was made for, if its config says so."""
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def unmasked(backbone: PreTrainedModel) -> PreTrainedModel:
    """The backbone without random masking of its input.

    Only ViTMAE masks by default. For it this returns a view that shares every parameter and keeps all patches, so that
    neither the weights are copied nor the caller's model is changed. Every other backbone is returned as it is.
    """
    if backbone.config.model_type != "vit_mae" or backbone.config.mask_ratio == 0:
        return backbone
    _install_capturing_hooks(backbone)
    view = _shallow_copy(backbone)
    view.config = copy.deepcopy(backbone.config)
    view.config.mask_ratio = 0.0
    view.embeddings = _shallow_copy(backbone.embeddings)
    view.embeddings.config = view.config
    return view


def _shallow_copy(module: Any) -> Any:
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    return clone


def _install_capturing_hooks(backbone: PreTrainedModel) -> None:
    # transformers hooks the layers on first use and remembers it on the model: view and original share the layers, so
    # the hooks must be there before the view is made, or they would be installed twice
    try:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:
        return
    maybe_install_capturing_hooks(backbone)


@dataclass(frozen=True)
class CallConvention:
    """What a backbone's forward needs beside the pixels; found once, so that `torch.compile` sees plain values.

    Attributes:
        interpolates (`bool`): its forward takes `interpolate_pos_encoding`.
        native_size (`(int, int)`, *optional*): the size at which nothing needs to be interpolated.
        noise_stride (`int`, *optional*): ViTMAE's patch size; it then needs noise that keeps the raster order.
    """

    interpolates: bool
    native_size: tuple[int, int] | None
    noise_stride: int | None

    @classmethod
    def of(cls, backbone: PreTrainedModel) -> "CallConvention":
        config = backbone.config
        return cls(
            interpolates="interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters,
            native_size=native_image_size(config),
            noise_stride=config.patch_size if config.model_type == "vit_mae" else None,
        )

    def complete(self, pixel_values: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of one call: those given, and what this backbone needs on top."""
        height, width = pixel_values.shape[-2:]
        kwargs = dict(given)
        if self.interpolates and (height, width) != self.native_size:
            kwargs.setdefault("interpolate_pos_encoding", True)
        if self.noise_stride is not None and "noise" not in kwargs:
            # increasing noise keeps ViTMAE's patches in raster order; float32, since equal values would not
            num_patches = (height // self.noise_stride) * (width // self.noise_stride)
            noise = torch.arange(num_patches, dtype=torch.float32, device=pixel_values.device)
            kwargs["noise"] = noise.expand(len(pixel_values), -1)
        return kwargs


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Runs a block with the model in evaluation mode, then puts every module back as it was."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def first_sentence(error: BaseException) -> str:
    """The first line of an error, without its final stop, to be quoted inside one of ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".")
