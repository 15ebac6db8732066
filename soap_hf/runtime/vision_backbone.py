"""Vision backbones: loaded with every weight of the checkpoint, and called so that every patch comes out."""

import copy
import functools
import hashlib
import inspect
import os
from collections import OrderedDict
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import logging
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .errors import BackboneError, first_sentence
from .head_files import HUB_KWARGS

logger = logging.get_logger(__name__)

PIXEL_ARGUMENTS = ("pixel_values", "pixel_values_videos")
_BESIDE_PIXELS = {"input_ids", "decoder_input_ids", "decoder_inputs_embeds"}
_PACKED_ARGUMENTS = {"pixel_attention_mask", "spatial_shapes"}
_POOLER = "pooler."


def load_backbone(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """Loads a vision backbone by hub id or folder, with every weight from the checkpoint.

    Of a composite model (CLIP, SigLIP, BLIP-2, …) the vision tower is taken. `kwargs` reach
    `AutoModel.from_pretrained` (`revision`, `dtype`, `device_map`, `token`, …). It comes in evaluation mode; a pooler
    that the checkpoint lacks is taken out, so that `pooler_output` is `None` rather than made by random weights.

    Raises:
        BackboneError: it cannot be found or loaded, takes no images, or the checkpoint lacks weights.
    """
    hub_kwargs = {name: value for name, value in kwargs.items() if name in (*HUB_KWARGS, "trust_remote_code")}
    if os.path.isabs(name_or_path) and not os.path.isdir(name_or_path):
        raise BackboneError(f"There is no folder {name_or_path} with a backbone; if it moved, pass backbone=….")
    try:
        config = AutoConfig.from_pretrained(name_or_path, **hub_kwargs)
        _refuse_head(config, name_or_path)
        inner = tower_config(config)
        if inner is not None and type(inner) in MODEL_MAPPING:
            tower, missing = _load(name_or_path, AutoModel, config=inner, **kwargs)
            if all(key.startswith(_POOLER) for key in missing):
                return _finish(tower, missing, name_or_path)
        backbone, missing = _load(name_or_path, _model_class(config), **kwargs)
    except BackboneError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        known = "give the hub id or the folder of a transformers vision model"
        way = "read its code, then pass trust_remote_code=True" if "trust_remote_code" in str(error) else known
        raise BackboneError(f"Backbone {name_or_path!r} cannot be loaded ({first_sentence(error)}); {way}.") from error
    if inner is not None:
        path, backbone = _only_tower(backbone)
        missing = [key.removeprefix(f"{path}.") for key in missing if key.startswith(f"{path}.")]
    return _finish(backbone, missing, name_or_path)


def bare_backbone(model: nn.Module) -> PreTrainedModel:
    """The part of a live model that returns tokens: a task model's base model, a composite model's vision tower."""
    if not isinstance(model, PreTrainedModel):
        merge = "; give model.merge_and_unload()" if hasattr(model, "merge_and_unload") else ""
        raise BackboneError(
            f"A backbone must be a transformers model, a hub id or a folder, not {type(model).__name__}{merge}."
        )
    _refuse_head(model.config, type(model).__name__)
    if tower_config(model.config) is not None:
        return _only_tower(model)[1]
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


def random_backbone(config: PretrainedConfig) -> PreTrainedModel:
    """A backbone of this configuration with random weights, as `from_config` makes it."""
    known = _model_class(config)
    return AutoModel.from_config(config) if known is AutoModel else known._from_config(config)


def tower_config(config: PretrainedConfig) -> PretrainedConfig | None:
    """The configuration of a composite model's vision tower; `None` for a plain vision model."""
    found = (getattr(config, name, None) for name in ("vision_config", "image_config", "encoder"))
    return next((single for single in found if isinstance(single, PretrainedConfig)), None)


def vision_towers(model: nn.Module) -> dict[str, PreTrainedModel]:
    """Paths and modules of the vision backbones of transformers in a model; no task model beside the one inside it."""
    known: dict[str, PreTrainedModel] = {}
    others: dict[str, PreTrainedModel] = {}
    for path, module in model.named_modules():
        inside = any(is_inside(path, above) for above in known)
        if not inside and isinstance(module, PreTrainedModel) and takes_pixels(module):
            (known if is_automodel(module) else others)[path] = module
    found = known | others
    holders = {path for path in others if any(is_inside(below, path) for below in found if below != path)}
    return {path: module for path, module in found.items() if path not in holders}


def is_inside(path: str, above: str) -> bool:
    """Whether the module at `path` is a part of the one at `above`."""
    return above == "" or path.startswith(f"{above}.")


def is_automodel(model: nn.Module) -> bool:
    """Whether this is the model that `AutoModel` gives for its config."""
    known = MODEL_MAPPING.get(type(getattr(model, "config", None)), ())
    return type(model) in (known if isinstance(known, (list, tuple)) else (known,))


def takes_pixels(model: Any) -> bool:
    """Whether a model's forward has an argument for pixels, and none for text or queries."""
    arguments = inspect.signature(model.forward).parameters
    if any(argument.kind == argument.VAR_POSITIONAL for argument in arguments.values()):  # it does not tell
        return model.main_input_name in PIXEL_ARGUMENTS
    return not _BESIDE_PIXELS & set(arguments) and any(name in arguments for name in PIXEL_ARGUMENTS)


def _refuse_head(config: PretrainedConfig, name: str) -> None:
    if config.model_type == "soap":
        raise BackboneError(f"{name} is a SOAP head, not a backbone; give the backbone that it was fitted on.")


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
    if lacking := [key for key in missing if not key.startswith(_POOLER)]:
        raise BackboneError(
            f"The checkpoint {name!r} lacks weights of {type(backbone).__name__} (e.g. {lacking[0]}; {len(lacking)} "
            "in all), which would be random; load the right model class and pass the live model."
        )
    if missing:
        backbone.pooler = None
    return backbone.eval()


def _only_tower(model: PreTrainedModel) -> tuple[str, PreTrainedModel]:
    """Path and module of a composite model's vision tower, if it has one and no other."""
    found = {path: tower for path, tower in vision_towers(model).items() if tower is not model}
    if len(found) != 1:
        raise BackboneError(
            f"The vision tower of {type(model).__name__} ({model.config.model_type}) was not found; pass it as a live "
            "model, e.g. model.vision_model."
        )
    return next(iter(found.items()))


def _require_images(backbone: PreTrainedModel, name: str) -> None:
    if not takes_pixels(backbone):
        kind = backbone.config.model_type
        raise BackboneError(f"{name} ({kind}) is not a vision backbone: its forward takes no pixels, or text too.")


def unmasked(backbone: PreTrainedModel) -> PreTrainedModel:
    """The backbone without random masking: of a ViTMAE a view with all patches, which shares its parameters."""
    if backbone.config.model_type != "vit_mae" or backbone.config.mask_ratio == 0:
        return backbone
    maybe_install_capturing_hooks(backbone)  # now: layers that a view shares would later be hooked twice
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


def unhooked(module: nn.Module, done: dict[int, nn.Module] | None = None) -> nn.Module:
    """The module with the same weights, without the hooks of transformers, which cannot be stored and which return."""
    done = {} if done is None else done
    if id(module) not in done:
        clone = done[id(module)] = copy.copy(module)
        hooks = module._forward_hooks.items()
        kept = ((key, hook) for key, hook in hooks if getattr(hook, "__name__", "") != "output_capturing_hook")
        clone._forward_hooks = OrderedDict(kept)
        clone.__dict__.pop("_output_capturing_hooks_installed", None)
        clone._modules = {name: child and unhooked(child, done) for name, child in module._modules.items()}
    return done[id(module)]


def weight_digests(backbone: PreTrainedModel) -> dict[str, str]:
    """Digests of all weights: as they are and, of float32, rounded to other dtypes; none if quantized or not here."""
    if any(weight.is_meta or not weight.is_floating_point() for weight in backbone.parameters()):
        return {}
    state = {name: weight for name, weight in backbone.state_dict().items() if not name.startswith(_POOLER)}
    weights = [weight for weight in state.values() if weight.is_floating_point() and weight.numel()]
    is_wide = backbone.dtype in (torch.float32, torch.float64)
    dtypes = (torch.float32, torch.float16, torch.bfloat16) if is_wide else (backbone.dtype,)
    # the names differ from those of before, when a few values of each weight were looked at
    return {f"{str(dtype).removeprefix('torch.')}:all": _digest(weights, dtype) for dtype in dtypes}


def _digest(weights: list[Tensor], dtype: torch.dtype) -> str:
    """Of the bits of weights as float32, after rounding: their sums along two axes, exact in any order of adding."""
    digest = hashlib.sha256()
    for weight in weights:
        values = weight.flatten() if weight.is_cuda else weight.flatten().cpu()
        columns, rows = torch.zeros(512, dtype=torch.int64, device=values.device), []
        # on a CPU as much at a time as one thread does alone: a busy machine is slow to bring several together
        for part in values.split(len(values) if weight.is_cuda else 31 << 10):
            padded = nn.functional.pad(part.to(dtype).float(), (0, -len(part) % 1024))
            table = padded.view(torch.int64).view(-1, 512)  # two values in each number, whose sum wraps
            columns += table.sum(0)
            rows.append(table.sum(1))
        digest.update(torch.cat([columns, *rows]).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def has_other_weights(found: dict[str, str], digests: dict[str, str]) -> bool:
    """Whether two models have other weights by their digests, and neither are the other's, rounded."""
    if not found.keys() & digests.keys():
        return False  # nobody knows
    own, others = (known[max(known)] for known in (found, digests))  # float32's is the last by name
    return own not in digests.values() and others not in found.values()


def warn_of_other_weights(backbone: PreTrainedModel, found: dict[str, str], digests: dict[str, str]) -> None:
    """Says so if a head that was fitted on weights of these digests is put on others, whose digests were found."""
    if has_other_weights(found, digests):
        logger.warning(
            f"The weights of {type(backbone).__name__} ({backbone.name_or_path or 'in memory'}) are not those the "
            "head was fitted on: pass a model with those, e.g. as backbone=…, or fit the head again."
        )


@dataclass(frozen=True)
class CallConvention:
    """What a backbone's forward needs beside the pixels; found once, so that `torch.compile` sees plain values."""

    pixel_argument: str  # its name for the pixels
    interpolates: bool  # its forward takes `interpolate_pos_encoding`
    native_size: tuple[int, int] | None  # (height, width) at which nothing needs to be interpolated
    noise_stride: int | None = None  # ViTMAE's patch size: it needs noise that keeps the raster order
    num_frames: int | None = None  # length of a clip: a still is repeated so often for a video backbone
    packed_patch: int | None = None  # patch size of a backbone that takes patches rather than images (SigLIP 2)
    returns_tuples: bool = False  # its config asks for tuples, so a call must ask for names

    @classmethod
    def of(cls, backbone: PreTrainedModel) -> "CallConvention":
        """The convention of one backbone; a `BackboneError` if it needs what cannot be made from an image alone."""
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
