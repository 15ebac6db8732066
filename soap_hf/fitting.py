"""Fitting: from a backbone and some images to a head."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedModel
from transformers.utils import logging

from .call_convention import native_image_size
from .checkpoint import Checkpoint
from .data import open_dataset, public_name
from .errors import BackboneError
from .fit_inputs import all_layers, check_arguments, find_backbone, identify_fit
from .image_sample import SHUFFLE_BUFFER, ImageSample
from .modeling_soap import SOAPModelWrapper
from .patch_layout import PatchLayout, as_size
from .preprocessing import ImagePreprocessor, load_image_processor
from .processes import join_processes, on_main
from .report import print_report
from .semantic_invariance import suppression_weights
from .soap_statistics import SOAPStatistics
from .token_cache import parse_bytes
from .token_passes import PassOptions, TokenPasses
from .token_reader import TokenReader
from .version import package_versions

logger = logging.get_logger(__name__)

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
    batch_size: int | Literal["auto"] = 32,
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
    token_cache: int | str = "2GB",
    exact: bool = False,
    tolerance: float | None = None,
    compile: bool = False,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    progress: bool = True,
) -> SOAPModelWrapper:
    """Finds the directions of a backbone's patch tokens that answer to position rather than content, and removes them.

    Each real image goes through the backbone once, and as many synthetic images without content do. Nothing is
    trained (arXiv 2604.00172). Under `accelerate launch` or `torchrun` the processes share the images, and all return
    the same head; call it in each of them.

    Args:
        backbone (`str` or `PreTrainedModel`): hub id, folder or live model; a live model is not changed.
        dataset: hub id, folder of images, parquet file, or a `datasets` object.
        image_column (`str`, defaults to `"image"`): the column that holds the images.
        split, config_name (`str`, *optional*), streaming (`bool`): as in `datasets.load_dataset`; the default split is
            the only one, else `"train"`.
        num_images (`int`, defaults to 1000): size of the seeded random sample; all images if there are fewer, or if
            `None`.
        num_synthetic (`int`, *optional*): default: as many as real images whose responses count.
        batch_size (`int` or `"auto"`, defaults to 32): images a forward pass; `"auto"` looks for the largest that an
            accelerator holds.
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
        token_cache (`int` or `str`, defaults to `"2GB"`): memory of all processes together for the tokens of real
            images, until their components are known. All count for the components; for the responses those that fit:
            the first of the random order.
        exact (`bool`, defaults to `False`): read all real images a second time for their responses instead.
        tolerance (`float`, *optional*): stop reading real images when what would be removed has moved by less for
            three checks running (see `Convergence`).
        compile (`bool`, defaults to `False`): run the backbone through `torch.compile`.
        checkpoint (`str`, *optional*): file for what was added up so far, written when SIGINT, SIGTERM or an error
            ends the fit; it is left to the caller to remove it.
        checkpoint_every (`int`, *optional*): write it after so many images, too.
        resume (`bool`, defaults to `False`): go on from there.
        progress (`bool`, defaults to `True`): show bars, and a table of components at the end.

    Returns:
        [`SOAPModelWrapper`] with `.statistics`, in evaluation mode; a live model stays in the mode it is in.

    Raises:
        BackboneError, DataError, LayoutError: the input does not fit together; raised before any long work.
        DataError: too many unreadable images; names them.
        NonFiniteTokensError: tokens with NaN or Inf; names the batch.
        CheckpointError: the checkpoint is of another fit; names the difference.
        FitInterrupted: a signal ended the fit, and its checkpoint is written.

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
    check_arguments(
        num_images,
        num_synthetic,
        batch_size,
        seed,
        layer,
        image_size,
        tolerance,
        checkpoint,
        checkpoint_every,
        resume,
    )
    memory = parse_bytes(token_cache)
    join_processes(device)
    live, name, pin = find_backbone(backbone, dtype, device, revision, token, trust_remote_code)
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
        layers = all_layers(live, preprocess.size)
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
        on_main(
            logger.warning,
            f"The data set has {sample.available} images, fewer than the {num_images} asked for: all are used.",
        )
    origin = {
        "dataset": public_name(dataset, opened),
        "config_name": config_name,
        "split": str(opened.split) if opened.split is not None else split,
        "image_column": image_column,
        "shuffle_buffer": SHUFFLE_BUFFER if sample.streamed else None,
        "isotropic": isotropic,
        "seed": seed,
        "exact": exact,
    }
    saved = None
    if checkpoint is not None:
        sizes = {"num_images": num_images, "num_synthetic": num_synthetic, "token_cache": memory}
        identity = identify_fit(model, sample, preprocess, **origin, **sizes)
        saved = Checkpoint(Path(checkpoint), identity, checkpoint_every)
    reader = TokenReader(
        model,
        sample,
        preprocess,
        batch_size=batch_size,
        num_workers=num_workers,
        seed=seed,
        isotropic=isotropic,
        compiled=compile,
    )
    weigh = partial(suppression_weights, mu=mu, tau=tau, threshold=threshold)
    options = PassOptions(num_synthetic, memory, exact, tolerance, max_bad_images, progress)
    passes = TokenPasses(reader, options, weigh, saved)
    if saved is not None and resume:
        saved.restore(passes.state)
    elif saved is not None:
        saved.refuse_to_overwrite()
    statistics = passes.statistics()
    model.set_statistics(statistics)
    model.reweight(mu, tau, threshold)
    state, some = passes.state, statistics[layers[0]]
    model.config.fit = {
        **origin,
        "num_images": state.num_readable,
        "num_response_images": some.num_real,
        "num_synthetic": some.num_synthetic,
        "num_bad_images": state.num_bad,
        "image_size": list(preprocess.size),
        "tolerance": state.convergence.tolerance,
        "converged_after": state.convergence.converged_after,
        "versions": package_versions(),
    }
    on_main(_say_what_was_found, model, statistics)
    if progress:
        on_main(print_report, model.config)
    return model.eval() if isinstance(backbone, (str, os.PathLike)) else model


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
