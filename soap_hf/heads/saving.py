"""Saving a head: its own files alone, whole or not at all, with a reference to its backbone."""

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import logging

from ..files import staging_folder
from ..runtime.errors import OutputError
from ..runtime.head_files import CONFIG_FILE, is_head_config
from ..statistics.soap_statistics import STORED_COMPONENTS
from .card import CARD_FILE, refresh_card
from .opening import BACKBONE_FOLDER, FIGURES_FOLDER, INCLUDED_BACKBONE, OPTIONAL_FILES, statistics_file

logger = logging.get_logger(__name__)


def save_head(
    model: Any, folder: str | os.PathLike, include_backbone: bool, figures: Mapping[str, bytes] | None, **kwargs: Any
) -> None:
    """Writes a head into a folder; see [`SOAPModelWrapper.save_pretrained`]."""
    target = Path(folder)
    refuse_other_model(target)
    # a backbone that came from inside the head's repository has no other place
    include_backbone = include_backbone or (model.config.backbone_name_or_path or "").startswith("./")
    if not include_backbone and differ(model.weights_when_wrapped, weight_sample(model.backbone)):
        logger.warning(
            "The backbone's weights have changed since it was put under this head, and saving writes the head "
            "alone: they will be lost. Pass include_backbone=True to keep them."
        )
    loaded, image_processor = model.statistics_by_layer, model.image_processor  # may come from the Hub
    with staging_folder(target, OPTIONAL_FILES) as staging:
        with _head_alone(model, target, include_backbone):
            PreTrainedModel.save_pretrained(model, staging, save_original_format=False, **kwargs)
        for layer, statistics in loaded.items():
            rank = model.config.ranks[model.config.layers.index(layer)]
            path = staging / statistics_file(model.config, layer)
            statistics.save(path, num_components=max(rank, STORED_COMPONENTS))
        if image_processor is not None:
            image_processor.save_pretrained(staging)
        for name, content in (figures or {}).items():
            (staging / FIGURES_FOLDER).mkdir(exist_ok=True)
            (staging / FIGURES_FOLDER / name).write_bytes(content)
        if include_backbone:
            save_backbone(model, staging)
        refresh_card(staging, earlier=target / CARD_FILE)


def save_backbone(model: Any, folder: Path) -> None:
    """Writes the backbone of a head into the head's folder."""
    model.backbone.save_pretrained(folder / BACKBONE_FOLDER)
    if isinstance(model.config.backbone, PretrainedConfig):  # a ViTMAE's view says that nothing is masked
        model.config.backbone.save_pretrained(folder / BACKBONE_FOLDER)


def refuse_other_model(folder: Path) -> None:
    """Refuses to write a head over a backbone, or over any other model."""
    config = folder / CONFIG_FILE
    try:
        values = json.loads(config.read_text(encoding="utf-8")) if config.exists() else None
    except ValueError:
        values = {}
    if values is not None and not is_head_config(values):
        found = values.get("model_type") if isinstance(values, dict) else None
        raise OutputError(f"{folder} holds another model ({found}), which a head would overwrite; choose another.")


def weight_sample(backbone: nn.Module) -> Tensor:
    """A few values of every weight, float32 on the CPU: another training changes nearly all of them."""
    # not autograd's counts of writes in place: fused optimisers, the Trainer's default, do not raise them
    known = (parameter.detach() for parameter in backbone.parameters() if not parameter.is_meta)
    return torch.cat([torch.zeros(0), *(parameter.flatten()[:8].float().cpu() for parameter in known)])


def differ(first: Tensor, second: Tensor) -> bool:
    """Whether samples of weights differ by more than a change of dtype and back makes them."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    return first.shape != second.shape or not any(torch.equal(first.to(dtype).float(), second) for dtype in dtypes)


def relative_reference(backbone: str, folder: str | os.PathLike) -> str:
    """How a head in `folder` refers to a backbone: relative if that lies inside or beside it, else as it is."""
    if not os.path.isdir(backbone):
        return backbone
    head, target = os.path.realpath(folder), os.path.realpath(backbone)
    relative = Path(os.path.relpath(target, head)).as_posix()
    if os.path.commonpath([os.path.dirname(head), target]) != os.path.dirname(head):
        return target
    return relative if relative.startswith("..") else f"./{relative}"


@contextmanager
def _head_alone(model: Any, target: Path, include_backbone: bool) -> Iterator[None]:
    """Within the block, the backbone's weights are left out, and the config refers to it as `target` should."""
    live = model.config
    # only now: a model that holds this one as a part must save the backbone's weights, or it would lose them
    model._keys_to_ignore_on_save = {f"backbone.{name}" for name in model.backbone.state_dict()}
    model.config = copy.deepcopy(live)
    model.config.__dict__.pop("auto_map", None)  # the code that it names stays where it came from
    if include_backbone:
        model.config.backbone_name_or_path, model.config.backbone_revision = INCLUDED_BACKBONE, None
    elif live.backbone_name_or_path:
        model.config.backbone_name_or_path = relative_reference(live.backbone_name_or_path, target)
    try:
        yield
    finally:
        model.config = live
        model._keys_to_ignore_on_save = set()
