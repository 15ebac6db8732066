"""A head's backbone at work: the pixels that it is given, and the raw patch tokens that it gives."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.utils import logging

from ..data.preprocessing import ImagePreprocessor, load_image_processor, timm_processor
from ..layout.plain import PlainBackbone
from ..layout.probing import whole_numbers
from ..processes import on_main
from ..runtime.modeling_soap import SOAPModelWrapper
from ..runtime.patch_layout import as_size, check_finite, layer_tokens

logger = logging.get_logger(__name__)


class RawTokens(NamedTuple):
    """Patch tokens `(B, *grid, D)` and, where there are any, CLS tokens `(B, D)`, as the backbone made them."""

    patches: Tensor
    cls: Tensor | None


def read_raw_tokens(
    model: SOAPModelWrapper, pixels: Tensor, where: str, *, forward: Callable[[Tensor], Any] | None = None
) -> dict[int, RawTokens]:
    """Runs the backbone once, in the mode it is in, and leaves the tokens of the head's layers as they are.

    `pixels` are `(B, 3, H, W)` as the image processor makes them, on any device. `where` is what a
    `NonFiniteTokensError` calls them. `forward` runs the model, compiled perhaps; default: the model itself.
    """
    pixels = pixels.to(model.device, model.dtype, non_blocking=True)
    with model.disabled():
        outputs = (model if forward is None else forward)(pixels)
    found = {}
    for layer, layout in model.layouts.items():
        tokens = layer_tokens(outputs, layer)
        patches = layout.patches(tokens, (pixels.shape[-2], pixels.shape[-1]))
        if patches.device.type == "mps":  # which has no float64 for the statistics
            patches = patches.cpu()
        check_finite(patches, f"The patch tokens of {where}")
        found[layer] = RawTokens(patches, tokens[:, 0] if layout.order == "tokens" and layout.prefix else None)
    return found


def head_preprocessor(
    model: Any, image_size: int | tuple[int, int] | None = None, *, processor: Any = None
) -> ImagePreprocessor:
    """What makes pixels for a head: `processor`, else its own, its backbone's, or the documented default.

    `image_size` is the model's input size; default: the processor's. A `DataError` says what the processor cannot.
    """
    size, native, config = as_size(image_size), model.convention.native_size, model.config
    if size is not None:
        warn_of_part_patches(model, size)
    processor = processor or model.image_processor
    if processor is None:
        name, fallback = config.backbone_name_or_path, size or native or (224, 224)
        processor = processor_of_backbone(model.backbone, name, fallback, revision=config.backbone_revision)
    return ImagePreprocessor(processor, size, native)


def warn_of_part_patches(model: SOAPModelWrapper, size: tuple[int, int]) -> None:
    """Warns of a size `(height, width)` that is no whole number of patches, if these are known."""
    patch = getattr(model.config.backbone or model.backbone.config, "patch_size", None)
    sides = list(whole_numbers(patch))
    if len(set(sides)) != 1 or all(side % sides[0] == 0 for side in size):
        return
    whole = [max(1, side // sides[0]) * sides[0] for side in size]
    way_out = f"{whole[0]}" if len(set(whole)) == 1 else f"{whole[0]}x{whole[1]}"
    on_main(
        logger.warning,
        f"An image size of {size[0]} x {size[1]} is no whole number of the backbone's patches of {sides[0]} pixels: "
        f"the right and lower edge are cut off or padded; {way_out} is one.",
    )


def processor_of_backbone(
    backbone: nn.Module, name: str | None, fallback_size: tuple[int, int], **hub_kwargs: Any
) -> Any:
    """The image processor beside a backbone's weights, of timm's that of its settings; else the documented default."""
    if not isinstance(backbone, PlainBackbone):
        return load_image_processor(name, fallback_size, **hub_kwargs)
    settings = getattr(backbone.module, "pretrained_cfg", None)
    if isinstance(settings, Mapping) and settings.get("mean"):
        return timm_processor(settings)
    return load_image_processor(None, fallback_size)
