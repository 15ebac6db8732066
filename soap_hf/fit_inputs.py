"""What a fit is given: arguments, backbone, layers, data set; and the names by which a checkpoint knows them."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from accelerate import PartialState
from transformers import PreTrainedModel
from transformers.utils import logging

from .backbones import bare_backbone, load_backbone, resolve_commit
from .errors import BackboneError, DataError, LayoutError, first_sentence
from .image_sample import ImageSample
from .modeling_soap import SOAPModelWrapper
from .patch_layout import PatchLayout, as_size
from .preprocessing import ImagePreprocessor
from .probing import Probe
from .version import package_versions

logger = logging.get_logger(__name__)

MAX_IMAGE_SIDE = 8192
"""A longer side is a slip of the pen, and its synthetic images alone would fill the memory."""


def check_arguments(
    num_images: int | None,
    num_synthetic: int | None,
    batch_size: int | Literal["auto"],
    seed: int,
    layer: int | Sequence[int] | Literal["all"],
    image_size: int | tuple[int, int] | None,
    tolerance: float | None,
    checkpoint: str | os.PathLike | None,
    checkpoint_every: int | None,
    resume: bool,
) -> None:
    """Refuses impossible arguments of `fit_soap`.

    Raises:
        DataError, LayoutError: names the argument.
    """
    if any(number is not None and number < 2 for number in (num_images, num_synthetic)):
        raise DataError("A fit needs at least 2 real and 2 synthetic images; raise num_images or num_synthetic.")
    sized = batch_size == "auto" or (isinstance(batch_size, int) and batch_size >= 1)
    if not sized or not 0 <= seed < 2**63:
        raise DataError(
            f'batch_size must be at least 1, or "auto", and seed from 0 to 2**63 - 1, not {batch_size} and {seed}.'
        )
    asked = [layer] if isinstance(layer, int) else layer
    if layer != "all" and not (len(asked) and all(isinstance(one, int) and one >= -1 for one in asked)):
        raise LayoutError(f'layer must be -1, the number of a hidden state, a list of those, or "all", not {layer!r}.')
    if max(as_size(image_size) or (0,)) > MAX_IMAGE_SIDE:
        raise DataError(f"image_size={image_size} is beyond {MAX_IMAGE_SIDE} pixels a side; choose a smaller one.")
    if tolerance is not None and not 0 < tolerance < 1:
        raise DataError(f"tolerance must lie between 0 and 1, not {tolerance}.")
    if checkpoint is None and (checkpoint_every is not None or resume):
        raise DataError("checkpoint_every and resume need to know where the checkpoint lies; pass checkpoint=….")
    if checkpoint_every is not None and checkpoint_every < 1:
        raise DataError(f"checkpoint_every must be at least 1 image, not {checkpoint_every}.")


def all_layers(live: PreTrainedModel, size: tuple[int, int]) -> list[int]:
    """All hidden states whose patch tokens can be found, and the last one after its norm."""
    probe = Probe(live, size, hidden_states=True)
    found = []
    for layer in (*range(len(getattr(probe.outputs, "hidden_states", None) or ())), -1):
        try:
            PatchLayout.from_probe(probe, layer)
            found.append(layer)
        except (LayoutError, BackboneError) as error:
            logger.warning(f"Layer {layer} is left out: {error}")
    return found


def find_backbone(
    backbone: str | os.PathLike | PreTrainedModel,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    revision: str | None,
    token: str | bool | None,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, str | None, str | None]:
    """The live backbone, where it came from, and the commit that pins it there."""
    if not isinstance(backbone, (str, os.PathLike)):
        if dtype is not None or device is not None:
            raise BackboneError(
                "dtype and device load a backbone by name; move a live model yourself and pass neither."
            )
        live = bare_backbone(backbone)
        return live, live.config.name_or_path or None, revision
    name = os.fspath(backbone)
    name = os.path.abspath(name) if os.path.isdir(name) else name  # the working directory may change
    target = find_device(device)
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise BackboneError(f"{dtype!r} is no dtype of torch; give float32, bfloat16 or float16.")
    if dtype is None:
        dtype = "float32" if target.type == "cpu" else "auto"
    pin = None if os.path.isdir(name) else resolve_commit(name, revision, token=token)
    live = load_backbone(name, dtype=dtype, revision=pin or "main", token=token, trust_remote_code=trust_remote_code)
    return live.to(target), name, pin


def find_device(device: str | torch.device | None = None) -> torch.device:
    """A device by name; by default this process's accelerator if there is one.

    Raises:
        BackboneError: it cannot be used here.
    """
    try:
        target = torch.device(device) if device is not None else PartialState().device
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise BackboneError(f"Device {device!r} cannot be used here ({first_sentence(error)}); try cpu.") from error
    return target


def identify_fit(model: SOAPModelWrapper, sample: ImageSample, preprocess: ImagePreprocessor, **told: Any) -> dict:
    """What names a fit, so that a checkpoint of another one is refused.

    Args:
        model, sample, preprocess: of the fit.
        told: more of its arguments, by name.

    Returns:
        `dict[str, str]` of what it is called in words to what it is.
    """
    config = model.config
    processes = PartialState().num_processes if sample.in_parts else None
    names = {
        "the backbone": config.backbone_name_or_path or type(model.backbone).__name__,
        "the backbone's revision": config.backbone_revision,
        "the digest of the backbone's weights": _digest_of_weights(model.backbone),
        "the dtype": config.backbone_dtype,
        "layer": config.layers,
        "the number of images in the sample": sample.available,
        "the digest of the first image": _digest_of_first_image(sample, preprocess),
        "the image size": preprocess.size,
        "the number of processes that share the stream": processes,
    }
    names |= {name.replace("_", " "): value for name, value in told.items()}
    names |= {f"the version of {package}": version for package, version in package_versions().items()}
    return {name: json.dumps(value) for name, value in names.items()}


def _digest_of_weights(backbone: PreTrainedModel) -> str:
    """Of the first entries of every parameter: another training changes nearly all of them."""
    digest = hashlib.sha256()
    for name, parameter in backbone.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().flatten()[:64].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _digest_of_first_image(sample: ImageSample, preprocess: ImagePreprocessor) -> str | None:
    if sample.streamed:  # which would fill its shuffle buffer for it
        return None
    (batch,) = sample.batches(preprocess, 1, stop=1)
    return None if batch.pixels is None else hashlib.sha256(batch.pixels.numpy().tobytes()).hexdigest()[:12]
