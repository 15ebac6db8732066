"""Fitting: from a backbone and some images to a head."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset
from transformers.utils import logging

from ..data.arguments import parse_bytes
from ..data.data_sets import open_dataset, public_name, source_of
from ..data.image_sample import SHUFFLE_BUFFER
from ..data.in_memory import in_random_order
from ..data.preprocessing import ImagePreprocessor, with_colours
from ..evaluation.check import check_head
from ..evaluation.examples import Examples
from ..evaluation.strength import choose_mu
from ..files import missing_path
from ..heads.model import SOAPModelWrapper
from ..heads.printing import show
from ..heads.report import print_report
from ..heads.running import processor_of_backbone, warn_of_part_patches
from ..layout.backbone import OpenedBackbone
from ..layout.detection import PatchLayout
from ..layout.plain import name_of
from ..processes import find_device, from_main_alone, join_processes, on_main
from ..runtime.errors import BackboneError, DataError, LayoutError, SOAPError
from ..runtime.patch_layout import as_size
from ..statistics.soap_statistics import SOAPStatistics
from ..version import package_versions
from .arguments import FitArguments
from .checkpoint import Checkpoint, fit_identity
from .passes import TokenPasses
from .reader import TokenReader
from .unseen import split_images

logger = logging.get_logger(__name__)

FEW_TO_FIT_ON = 64
"""Below this many images a fit warns about the standard error of its scores."""


def fit_soap(
    backbone: str | os.PathLike | nn.Module,
    dataset: str
    | os.PathLike
    | Dataset
    | IterableDataset
    | DatasetDict
    | IterableDatasetDict
    | Sequence[Any]
    | TorchDataset,
    *,
    tokens: str | Callable[[Tensor], Any] | None = None,
    image_processor: Any = None,
    layout: PatchLayout | None = None,
    **arguments: Any,
) -> SOAPModelWrapper:
    """Finds the directions of a backbone's patch tokens that respond to position, not content, and removes them.

    Each real image goes through the backbone once, and as many synthetic images without content do. Nothing is
    trained (arXiv 2604.00172). Under `accelerate launch` or `torchrun` the processes share the images, and all return
    the same head; call it in each of them.

    Args:
        backbone (`str` or `nn.Module`): hub id, folder or live model of transformers; a live module of any other
            library; or how to make one: `"torchhub:OWNER/REPOSITORY[:REF]:ENTRY"`, `"timm:NAME"`,
            `"package.module:function"`. A live model is not changed.
        dataset: hub id, folder of images, parquet file, a `datasets` object, a list of paths, PIL images or arrays, or
            a data set of torch, whose items are images, tuples that start with one, or dicts.
        tokens (`str` or callable, *optional*): of a module of another library, where its patch tokens are: the path of
            the module or method that makes them, and after a colon the key or number in its output, such as
            `"blocks.11"` or `"forward_features:x_norm_patchtokens"`; or a function of pixels `(B, 3, H, W)`. Found if
            not given where timm, DINOv2, CAPI and torchvision have them.
        image_processor (*optional*): default: the backbone's own, of timm what its `pretrained_cfg` says, else RGB,
            bicubic, ImageNet mean and std.
        layout ([`PatchLayout`], *optional*): where the patch tokens lie; found if not given.
        arguments: the fields of [`~soap_hf.fitting.arguments.FitArguments`]: `num_images=1000`, `image_size=None`,
            `layer=-1`, `mu="auto"`, `check=64`, `tau=0.05`, `threshold=0.75`, `isotropic=False`, `seed=0`,
            `batch_size=32`, `image_column="image"`, `split=None`, `config_name=None`, `streaming=False`,
            `num_synthetic=None`,
            `dtype=None`, `device=None`, `revision=None`, `token=None`, `trust_remote_code=False`, `num_workers=None`,
            `max_bad_fraction=0.01`, `token_cache="2GB"`, `exact=False`, `tolerance=None`, `compile=False`,
            `checkpoint=None`, `checkpoint_every=None`, `resume=False`, `mean=None`, `std=None`,
            `backbone_arguments=None`, `progress=True`.

    Returns:
        [`SOAPModelWrapper`] with `.statistics`, in evaluation mode; a live model stays in the mode it is in.

    Raises:
        BackboneError, DataError, LayoutError: the input does not fit together; raised before any long work.
        DataError: too many unreadable images; names them.
        NonFiniteTokensError: tokens with NaN or Inf; names the batch.
        CheckpointError: the checkpoint is of another fit; names the difference.
        FitInterrupted: a signal ended the fit, and its checkpoint is written.
        TypeError: there is no such argument.

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
    if isinstance(tokens, str):
        arguments["tokens"], tokens = tokens, None
    chosen = FitArguments.of("fit_soap", arguments)
    if isinstance(dataset, (str, os.PathLike)) and (problem := missing_path(dataset)):
        raise DataError(problem)  # before a backbone is fetched
    join_processes(chosen.device)
    opened = _opened_backbone(backbone, chosen, tokens or chosen.tokens)
    if opened.plain is not None and chosen.layer not in (-1, [-1], (-1,)):
        raise BackboneError(
            f"{name_of(opened.model)} is a module of another library, which has one tensor of tokens: instead of "
            'layer pass tokens="blocks.7", the path of the module that makes those of a layer, in a fit for each.'
        )
    if opened.num_channels != 3:
        raise BackboneError(
            f"{name_of(opened.model)} takes images of {opened.num_channels} channels, but a fit makes RGB; pass "
            "a backbone of 3."
        )
    size = as_size(chosen.image_size)
    if image_processor is None:
        fallback = size or opened.native_size or (224, 224)
        how = {"token": chosen.token, "trust_remote_code": chosen.trust_remote_code}
        where = {"revision": opened.revision, **how}
        image_processor = processor_of_backbone(opened.model, opened.name_or_path, fallback, **where)
    image_processor = with_colours(image_processor, chosen.mean, chosen.std)
    preprocess = ImagePreprocessor(image_processor, size, opened.native_size)
    layers = _layers(opened, preprocess.size, chosen.layer)
    model = SOAPModelWrapper.from_backbone(
        opened,
        dict.fromkeys(layers),
        layout=None if layout is None else dict.fromkeys(layers, layout),
        image_size=preprocess.size,
        image_processor=preprocess.resized_processor(),
    )
    opened.forget_probes()
    warn_of_part_patches(model, preprocess.size)
    source: Any = {"split": chosen.split, "config_name": chosen.config_name, "image_column": chosen.image_column}
    images = open_dataset(
        in_random_order(dataset, chosen.seed), streaming=chosen.streaming, token=chosen.token, **source
    )
    sample, checked, tuned = split_images(images, chosen)
    origin = {
        "dataset": public_name(dataset, images),
        "config_name": chosen.config_name,
        "split": str(images.split) if images.split is not None else chosen.split,
        "image_column": chosen.image_column,
        "shuffle_buffer": SHUFFLE_BUFFER if sample.streamed else None,
        "isotropic": chosen.isotropic,
        "seed": chosen.seed,
        "exact": chosen.exact,
    }
    saved = None
    if chosen.checkpoint is not None:
        sizes = {"num_images": chosen.num_images, "num_synthetic": chosen.num_synthetic}
        cache_size = parse_bytes(chosen.token_cache)
        identity = fit_identity(model, sample, preprocess, **origin, **sizes, token_cache=cache_size)
        saved = Checkpoint(Path(chosen.checkpoint), identity, chosen.checkpoint_every)
    passes = TokenPasses(TokenReader(model, sample, preprocess, chosen), chosen, saved)
    if saved is not None and chosen.resume:
        saved.restore(passes.state)
    elif saved is not None:
        saved.refuse_to_overwrite()
    statistics = passes.statistics()
    model.set_statistics(statistics)
    model.reweight(**chosen.strength)
    matching: dict[str, Any] = {"batch_size": 32 if chosen.batch_size == "auto" else chosen.batch_size}
    matching |= {"preprocess": preprocess, "seed": chosen.seed, "progress": chosen.progress}
    if tuned is not None:
        mu = from_main_alone(_matching_mu, model, tuned, **matching)
        model.reweight(**{**chosen.strength, "mu": mu})
    state, some = passes.state, statistics[layers[0]]
    model.config.fit = {
        **origin,
        "source": source_of(dataset),
        "num_images": state.num_readable,
        "num_response_images": some.num_real,
        "num_synthetic": some.num_synthetic,
        "num_bad_images": state.num_bad,
        "image_size": list(preprocess.size),
        "tolerance": state.convergence.tolerance,
        "converged_after": state.convergence.converged_after,
        "versions": package_versions(),
    }
    if tuned is not None:
        model.config.fit["mu"] = chosen.mu
    if checked is not None:
        model.config.checks = from_main_alone(_checks, model, checked, **matching)
    on_main(_warn_of_findings, model, statistics)
    if chosen.progress:
        on_main(print_report, model.config)
    return model.eval() if isinstance(backbone, (str, os.PathLike)) else model


def _matching_mu(model: SOAPModelWrapper, images: Examples, **options: Any) -> Any:
    """The strength that matching supports; `"auto"`, aloud, if it cannot be measured: that must not cost the fit."""
    try:
        choice = choose_mu(model, images, **options)
    except SOAPError as error:
        logger.warning(f'The strength stays at "auto", since matching could not choose one: {error}')
        return "auto"
    if options["progress"]:
        show(choice.table())
        show(choice.reason)
    return choice.mu


def _checks(model: SOAPModelWrapper, images: Examples, **options: Any) -> list[dict[str, Any]]:
    """What matching says of the head; nothing, aloud, if it cannot be measured: that must not cost the fit."""
    try:
        return check_head(model, images, **options)
    except SOAPError as error:
        logger.warning(f"The head is not checked: {error}")
        return []


def _opened_backbone(backbone: str | os.PathLike | nn.Module, chosen: FitArguments, tokens: Any) -> OpenedBackbone:
    """The backbone: a live one as it is, one by name on the device and in the dtype asked for."""
    if not isinstance(backbone, (str, os.PathLike)):
        if chosen.dtype is not None or chosen.device is not None:
            raise BackboneError(
                "dtype and device load a backbone by name; move a live model yourself and pass neither."
            )
        if chosen.backbone_arguments is not None:
            raise BackboneError("backbone_arguments make a backbone by reference; a live one is made already.")
        opened = OpenedBackbone(backbone, revision=chosen.revision, tokens=tokens, size=as_size(chosen.image_size))
        _say_dtype("live model", opened.model.dtype, opened.model.dtype, "move it by model.float() for full precision")
        return opened
    device = find_device(chosen.device)
    dtype = chosen.dtype or ("float32" if device.type == "cpu" else "auto")
    how: Any = {"token": chosen.token, "trust_remote_code": chosen.trust_remote_code}
    how |= {"tokens": tokens, "arguments": chosen.backbone_arguments, "size": as_size(chosen.image_size)}
    opened = OpenedBackbone.load(backbone, dtype=dtype, device=device, revision=chosen.revision, **how)
    if chosen.dtype is None:
        there = opened.checkpoint_dtype
        _say_dtype("checkpoint", there, opened.model.dtype, f"pass dtype={there or 'auto'} to keep that")
    return opened


def _say_dtype(what: str, dtype: Any, fitted: torch.dtype, way_out: str) -> None:
    """Says in what a backbone of half precision is fitted, which differs between live models and those by name."""
    name, used = (str(one).removeprefix("torch.") for one in (dtype, fitted))
    if name in ("float16", "bfloat16"):
        kept = "and is fitted so" if name == used else f"but is fitted in {used}"
        on_main(logger.warning, f"The {what} is in {name}, {kept}; {way_out}.")


def _layers(opened: OpenedBackbone, size: tuple[int, int], wanted: Any) -> list[int]:
    """The layers asked for; of `"all"` those whose patch tokens are found, and the last one after its norm."""
    if wanted != "all":
        return [wanted] if isinstance(wanted, int) else [int(single) for single in wanted]
    states = getattr(opened.probe(size, hidden_states=True).outputs, "hidden_states", None) or ()
    found = []
    for layer in (*range(len(states)), -1):
        try:
            opened.layout(layer, size, hidden_states=True)
            found.append(layer)
        except (LayoutError, BackboneError) as error:
            logger.warning(f"Layer {layer} is left out: {error}")
    return found


def _warn_of_findings(model: SOAPModelWrapper, statistics: dict[int, SOAPStatistics]) -> None:
    """Warns where a fit has found nothing, or has seen too little to be sure."""
    for (layer, single), rank in zip(statistics.items(), model.config.ranks, strict=True):
        top = int(single.scores.argmax())
        score, error = float(single.scores[top]), float(single.standard_errors[top])
        if single.num_real < FEW_TO_FIT_ON:
            logger.warning(
                f"Only {single.num_real} images: the top score of layer {layer} is {score:.3f} with a standard error "
                f"of {error:.3f}; use {FEW_TO_FIT_ON} or more."
            )
        if rank == 0:
            logger.warning(
                f"Nothing is removed from layer {layer}: its top score is {score:.3f}, and mu={model.config.mu} at "
                f"threshold {model.config.threshold} finds no component to suppress."
            )
