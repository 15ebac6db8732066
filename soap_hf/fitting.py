"""Fitting: from a backbone and some images to a head."""

import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedModel
from transformers.utils import logging

from .backbones import bare_backbone, load_backbone, resolve_commit
from .call_convention import native_image_size
from .data import SHUFFLE_BUFFER, ImageSample, open_dataset, public_name
from .errors import BackboneError, DataError, LayoutError, first_sentence
from .modeling_soap import SOAPModelWrapper
from .patch_layout import PatchLayout, as_size
from .preprocessing import ImagePreprocessor, load_image_processor
from .probing import Probe
from .report import print_report
from .semantic_invariance import suppression_weights
from .soap_statistics import SOAPStatistics
from .token_passes import TokenPasses
from .version import package_versions

logger = logging.get_logger(__name__)

MAX_IMAGE_SIDE = 8192
"""A longer side is a slip of the pen, and its synthetic images alone would fill the memory."""

FEW_IMAGES = 64
"""Below this many images a fit warns about the standard error of its scores."""


def fit_soap(
    backbone: str | os.PathLike | PreTrainedModel,
    dataset: str | os.PathLike | Dataset | IterableDataset | DatasetDict | IterableDatasetDict,
    *,
    image_column: str = "image",
    split: str | None = None,
    config_name: str | None = None,
    streaming: bool = False,
    num_images: int | None = 1000,
    num_synthetic: int | None = None,
    batch_size: int = 32,
    image_processor: Any = None,
    image_size: int | tuple[int, int] | None = None,
    layer: int | Sequence[int] | Literal["all"] = -1,
    layout: PatchLayout | None = None,
    mu: float | Literal["auto"] = "auto",
    tau: float = 0.05,
    threshold: float = 0.75,
    isotropic: bool = False,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    num_workers: int | None = None,
    max_bad_images: float = 0.01,
    progress: bool = True,
) -> SOAPModelWrapper:
    """Finds the directions of a backbone's patch tokens that answer to position rather than content, and removes them.

    Real images are read twice, once for the principal components and once for their responses; as many synthetic
    images without content are drawn. Nothing is trained (arXiv 2604.00172).

    Args:
        backbone (`str` or `PreTrainedModel`): hub id, folder or live model; a live model is not changed.
        dataset: hub id, folder of images, parquet file, or a `datasets` object.
        image_column (`str`, defaults to `"image"`): the column that holds the images.
        split, config_name (`str`, *optional*), streaming (`bool`): as in `datasets.load_dataset`; the default split is
            the only one, else `"train"`.
        num_images (`int`, defaults to 1000): size of the seeded random sample; all images if there are fewer, or if
            `None`.
        num_synthetic (`int`, *optional*): as many as real images by default.
        batch_size (`int`, defaults to 32): images a forward pass.
        image_processor (*optional*): default: the backbone's own, else RGB, bicubic, ImageNet mean and std.
        image_size (`int` or `(height, width)`, *optional*): the model's input size; default: the processor's.
        layer (`int`, list of them, or `"all"`; defaults to -1): -1 for `last_hidden_state`, `i >= 0` for
            `hidden_states[i]`; `"all"` is every one of them whose patch tokens are found.
        layout ([`PatchLayout`], *optional*): where the patch tokens lie; found if not given.
        mu (`float` or `"auto"`), tau (`float`), threshold (`float`): as in `suppression_weights`.
        isotropic (`bool`, defaults to `False`): synthetic gradients without a preferred direction.
        seed (`int`, defaults to 0): of the sample and of the synthetic images.
        dtype (`str` or `torch.dtype`, *optional*): of the backbone; default: float32 on CPU, the checkpoint's on an
            accelerator.
        device (`str` or `torch.device`, *optional*): default: the accelerator if there is one.
        revision, token, trust_remote_code: for the backbone on the Hub.
        num_workers (`int`, *optional*): processes that decode images; default: what the machine and the sample allow.
        max_bad_images (`float`, defaults to 0.01): share of unreadable images that are skipped; at least one is.
        progress (`bool`, defaults to `True`): show bars, and a table of components at the end.

    Returns:
        [`SOAPModelWrapper`] with `.statistics`, in evaluation mode; a live model stays in the mode it is in.

    Raises:
        BackboneError, DataError, LayoutError: the input does not fit together; raised before any long work.
        DataError: too many unreadable images; names them.
        NonFiniteTokensError: tokens with NaN or Inf; names the batch.

    Example:
        >>> from datasets import Dataset
        >>> from PIL import Image
        >>> from transformers import ViTConfig, ViTModel
        >>> images = Dataset.from_dict({"image": [Image.new("RGB", (32, 32), (40 * i, 0, 0)) for i in range(6)]})
        >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        ...                          image_size=32, patch_size=8))
        >>> model = fit_soap(vit, images, progress=False)
        >>> model.config.fit["num_images"]
        6
    """
    suppression_weights(torch.ones(1), mu=mu, tau=tau, threshold=threshold)  # refuses bad arguments now, not later
    if any(number is not None and number < 2 for number in (num_images, num_synthetic)):
        raise DataError("A fit needs at least 2 real and 2 synthetic images; raise num_images or num_synthetic.")
    if batch_size < 1 or not 0 <= seed < 2**63:
        raise DataError(f"batch_size must be at least 1 and seed from 0 to 2**63 - 1, not {batch_size} and {seed}.")
    asked = [layer] if isinstance(layer, int) else layer
    if layer != "all" and not (len(asked) and all(isinstance(one, int) and one >= -1 for one in asked)):
        raise LayoutError(f'layer must be -1, the number of a hidden state, a list of those, or "all", not {layer!r}.')
    if max(as_size(image_size) or (0,)) > MAX_IMAGE_SIDE:
        raise DataError(f"image_size={image_size} is beyond {MAX_IMAGE_SIDE} pixels a side; choose a smaller one.")
    live, name, pin = _find_backbone(backbone, dtype, device, revision, token, trust_remote_code)
    channels = getattr(live.config, "num_channels", 3)
    if channels != 3:
        raise BackboneError(
            f"{type(live).__name__} takes images of {channels} channels, but a fit makes RGB; pass a backbone of 3."
        )
    if image_processor is None:
        fallback = as_size(image_size) or native_image_size(live.config) or (224, 224)
        hub_kwargs = {"revision": pin, "token": token, "trust_remote_code": trust_remote_code}
        image_processor = load_image_processor(name, fallback, **hub_kwargs)
    preprocess = ImagePreprocessor(image_processor, as_size(image_size), native_image_size(live.config))
    if layer == "all":
        layers = _all_layers(live, preprocess.size)
    else:
        layers = [layer] if isinstance(layer, int) else [int(single) for single in layer]
    model = SOAPModelWrapper.from_backbone(
        live,
        dict.fromkeys(layers),
        name_or_path=name,
        revision=pin,
        layout=None if layout is None else dict.fromkeys(layers, layout),
        image_size=preprocess.size,
        image_processor=preprocess.resized_processor(),
    )
    opened = open_dataset(dataset, split=split, config_name=config_name, streaming=streaming, token=token)
    sample = ImageSample(opened, image_column, num_images, seed)
    if num_images is not None and sample.available is not None and sample.available < num_images:
        logger.warning(
            f"The data set has {sample.available} images, fewer than the {num_images} asked for: all are used."
        )
    passes = TokenPasses(model, sample, preprocess, batch_size, num_workers, max_bad_images, progress)
    statistics = passes.statistics(num_synthetic, seed, isotropic)
    model.set_statistics(statistics)
    model.reweight(mu, tau, threshold)
    some = statistics[layers[0]]
    model.config.fit = {
        "dataset": public_name(dataset, opened),
        "config_name": config_name,
        "split": str(opened.split) if opened.split is not None else split,
        "image_column": image_column,
        "shuffle_buffer": SHUFFLE_BUFFER if sample.streamed else None,
        "num_images": some.num_real,
        "num_synthetic": some.num_synthetic,
        "num_bad_images": len(passes.bad_images),
        "image_size": list(preprocess.size),
        "isotropic": isotropic,
        "seed": seed,
        "versions": package_versions(),
    }
    _say_what_was_found(model, statistics)
    if progress:
        print_report(model.config)
    return model.eval() if isinstance(backbone, (str, os.PathLike)) else model


def _all_layers(live: PreTrainedModel, size: tuple[int, int]) -> list[int]:
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


def _find_backbone(
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
    """A device by name; by default the accelerator if there is one.

    Raises:
        BackboneError: it cannot be used here.
    """
    try:
        target = torch.device(device) if device is not None else PartialState().default_device
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise BackboneError(f"Device {device!r} cannot be used here ({first_sentence(error)}); try cpu.") from error
    return target


def _say_what_was_found(model: SOAPModelWrapper, statistics: dict[int, SOAPStatistics]) -> None:
    for (layer, single), rank in zip(statistics.items(), model.config.ranks, strict=True):
        top = int(single.scores.argmax())
        score, error = float(single.scores[top]), float(single.standard_errors[top])
        if single.num_real < FEW_IMAGES:
            logger.warning(
                f"Only {single.num_real} images: the top score of layer {layer} is {score:.3f} with a standard error "
                f"of {error:.3f}; use {FEW_IMAGES} or more."
            )
        if rank == 0:
            logger.warning(
                f"Nothing is removed from layer {layer}: its top score is {score:.3f}, and mu={model.config.mu} at "
                f"threshold {model.config.threshold} finds no component to suppress."
            )
