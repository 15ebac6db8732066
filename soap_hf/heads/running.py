"""A head's backbone at work: the pixels that it is given, and the raw patch tokens that it gives."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..data.preprocessing import ImagePreprocessor, load_image_processor
from ..runtime.patch_layout import as_size, check_finite, layer_tokens
from .model import SOAPModelWrapper


class RawTokens(NamedTuple):
    """Patch tokens `(B, *grid, D)` and, where there are any, CLS tokens `(B, D)`, as the backbone made them."""

    patches: Tensor
    cls: Tensor | None


def read_raw_tokens(
    model: SOAPModelWrapper, pixels: Tensor, where: str, *, forward: Callable[[Tensor], Any] | None = None
) -> dict[int, RawTokens]:
    """Runs the backbone once and leaves the tokens of the head's layers as they are.

    Args:
        model ([`SOAPModelWrapper`]): the head and its backbone, in the mode that they are to run in.
        pixels (`torch.Tensor` of shape `(B, 3, H, W)`): as the image processor makes them, on any device.
        where (`str`): what they are, for an error.
        forward (callable, *optional*): runs the model; default: the model itself. A compiled one is given here.

    Raises:
        NonFiniteTokensError: a patch token holds NaN or Inf.
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
    model: SOAPModelWrapper, image_size: int | tuple[int, int] | None = None, *, processor: Any = None
) -> ImagePreprocessor:
    """What makes pixels for a head: its image processor, else its backbone's, else the documented default.

    Args:
        model ([`SOAPModelWrapper`]): the head and its backbone.
        image_size (`int` or `(height, width)`, *optional*): the model's input size; default: the processor's.
        processor (*optional*): an image processor to be used instead.

    Raises:
        DataError: the processor cannot be read, or does not make images of that size.
    """
    size, native = as_size(image_size), model.convention.native_size
    config = model.config
    processor = (
        processor
        or model.image_processor
        or load_image_processor(
            config.backbone_name_or_path, size or native or (224, 224), revision=config.backbone_revision
        )
    )
    return ImagePreprocessor(processor, size, native)
