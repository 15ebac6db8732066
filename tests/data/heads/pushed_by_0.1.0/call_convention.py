"""Calling a backbone so that every patch comes out, in raster order, at any size it can take."""

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PretrainedConfig

from .errors import BackboneError

PIXEL_ARGUMENTS = ("pixel_values", "pixel_values_videos")
_BESIDE_PIXELS = {"input_ids", "decoder_input_ids", "decoder_inputs_embeds"}
_PACKED_ARGUMENTS = {"pixel_attention_mask", "spatial_shapes"}


def native_image_size(config: PretrainedConfig) -> tuple[int, int] | None:
    """`(height, width)` the backbone was made for, if its config says so."""
    size = getattr(config, "image_size", None) or getattr(config, "crop_size", None)
    if size is None and isinstance(getattr(config, "num_patches", None), int):
        size = round(config.num_patches**0.5) * config.patch_size
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def takes_pixels(model: Any) -> bool:
    """Whether a model's forward has an argument for pixels, and none for text or queries."""
    arguments = inspect.signature(model.forward).parameters
    if any(argument.kind == argument.VAR_POSITIONAL for argument in arguments.values()):  # it does not tell
        return model.main_input_name in PIXEL_ARGUMENTS
    return not _BESIDE_PIXELS & set(arguments) and any(name in arguments for name in PIXEL_ARGUMENTS)


def unmasked(backbone: PreTrainedModel) -> PreTrainedModel:
    """The backbone without random masking of its input.

    Only ViTMAE masks by default. For it this returns a view that shares every parameter and keeps all patches, so that
    neither the weights are copied nor the caller's model is changed. Every other backbone is returned as it is.
    """
    if backbone.config.model_type != "vit_mae" or backbone.config.mask_ratio == 0:
        return backbone
    install_capturing_hooks(backbone)
    view = _shallow_copy(backbone)
    view.config = copy.deepcopy(backbone.config)
    view.config.mask_ratio = 0.0
    view.embeddings = _shallow_copy(backbone.embeddings)
    view.embeddings.config = view.config
    return view


def _shallow_copy(module: Any) -> Any:
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    if hasattr(module, "_hf_hook"):  # accelerate has bound the original's forward to it
        clone._old_forward = module._old_forward.__func__.__get__(clone)
        clone.forward = functools.update_wrapper(functools.partial(module.forward.func, clone), module.forward)
    return clone


def install_capturing_hooks(backbone: PreTrainedModel) -> None:
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
        pixel_argument (`str`): its name for the pixels: `pixel_values` or `pixel_values_videos`.
        interpolates (`bool`): its forward takes `interpolate_pos_encoding`.
        native_size (`(int, int)`, *optional*): the size at which nothing needs to be interpolated.
        noise_stride (`int`, *optional*): ViTMAE's patch size; it then needs noise that keeps the raster order.
        num_frames (`int`, *optional*): length of a clip; a still is repeated so often for a video backbone.
        packed_patch (`int`, *optional*): patch size of a backbone that takes patches rather than images (SigLIP 2).
        returns_tuples (`bool`): its config asks for tuples, so a call must ask for names.
    """

    pixel_argument: str
    interpolates: bool
    native_size: tuple[int, int] | None
    noise_stride: int | None = None
    num_frames: int | None = None
    packed_patch: int | None = None
    returns_tuples: bool = False

    @classmethod
    def of(cls, backbone: PreTrainedModel) -> "CallConvention":
        """The convention of one backbone.

        Raises:
            BackboneError: it needs inputs that cannot be made from an image alone.
        """
        config, arguments = backbone.config, inspect.signature(backbone.forward).parameters
        required = {name for name, argument in arguments.items() if _is_required(argument)}
        packed = required >= _PACKED_ARGUMENTS
        unknown = required - set(PIXEL_ARGUMENTS) - (_PACKED_ARGUMENTS if packed else set())
        if unknown:
            raise BackboneError(
                f"{type(backbone).__name__} ({config.model_type}) needs {', '.join(sorted(unknown))} beside the "
                "pixels: it packs images in a way this package does not know; use one that takes (B, 3, H, W) pixels."
            )
        frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
        return cls(
            pixel_argument=next((name for name in PIXEL_ARGUMENTS if name in arguments), PIXEL_ARGUMENTS[0]),
            interpolates="interpolate_pos_encoding" in arguments,
            native_size=native_image_size(config),
            noise_stride=config.patch_size if config.model_type == "vit_mae" else None,
            num_frames=frames if isinstance(frames, int) else None,
            packed_patch=config.patch_size if packed else None,
            returns_tuples=getattr(config, "return_dict", True) is False,
        )

    def complete(self, pixels: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of one call: pixels and those given, and what this backbone needs on top.

        Images `(B, 3, H, W)` become clips for a video backbone and patches for one that takes those; clips and packed
        patches pass through.
        """
        kwargs = dict(given)
        if self.num_frames is not None and pixels.ndim == 4:
            pixels = pixels.unsqueeze(1).expand(-1, self.num_frames, -1, -1, -1)
        height, width = pixels.shape[-2:]
        if self.packed_patch is not None and pixels.ndim == 4:
            pixels, packing = _pack(pixels, self.packed_patch)
            kwargs = {**packing, **kwargs}
        if self.interpolates and (height, width) != self.native_size:
            kwargs.setdefault("interpolate_pos_encoding", True)
        if self.noise_stride is not None and "noise" not in kwargs:
            # increasing noise keeps ViTMAE's patches in raster order; float32, since equal values would not
            num_patches = (height // self.noise_stride) * (width // self.noise_stride)
            noise = torch.arange(num_patches, dtype=torch.float32, device=pixels.device)
            kwargs["noise"] = noise.expand(pixels.shape[0], -1)
        if self.returns_tuples:
            kwargs["return_dict"] = True
        return {self.pixel_argument: pixels, **kwargs}


def _is_required(argument: inspect.Parameter) -> bool:
    named = argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY)
    return named and argument.default is argument.empty


def _pack(pixels: Tensor, patch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Images `(B, C, H, W)` as patches `(B, h * w, patch * patch * C)` in raster order, and their mask and shapes."""
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    whole = pixels[..., : rows * patch, : columns * patch]
    patches = whole.unflatten(-1, (columns, patch)).unflatten(-3, (rows, patch))  # B, C, h, p, w, p
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2)
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device)
    shapes = torch.tensor([[rows, columns]], device=pixels.device).expand(len(pixels), -1)
    return patches, {"pixel_attention_mask": mask, "spatial_shapes": shapes}


_SHRINKS = "set_shift_and_window_size"


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Runs a block with the model in evaluation mode, then puts every module back as it was."""
    training = [(module, module.training) for module in model.modules()]
    # Swin shrinks its windows for good when an image is smaller than one
    windows = [(part, part.window_size, part.shift_size) for part in model.modules() if hasattr(part, _SHRINKS)]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for part, window_size, shift_size in windows:
            part.window_size, part.shift_size = window_size, shift_size
