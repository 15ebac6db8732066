"""Saving a head: its own files alone, whole or not at all, with a reference to its backbone."""

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import logging

from ..files import staging_folder
from ..runtime.errors import BackboneError, HeadError, OutputError, first_sentence
from ..runtime.head_files import ADAPTER_FILE, CONFIG_FILE, is_head_config
from ..runtime.vision_backbone import has_other_weights, load_backbone, weight_digests
from ..statistics.soap_statistics import STORED_COMPONENTS
from .adapters import adapted_layers, has_active_adapter, has_adapter, without_adapters, write_adapter
from .card import CARD_FILE, refresh_card
from .card_command import is_hub_id
from .opening import (
    BACKBONE_FOLDER,
    EVALUATIONS_FOLDER,
    FIGURES_FOLDER,
    INCLUDED_BACKBONE,
    OPTIONAL_FILES,
    HeadRecord,
    statistics_file,
)
from .plain import is_on_module

logger = logging.get_logger(__name__)

_WAY_IN = "the package soap-hf: write `import soap_hf` before you load this head"
WITHOUT_CODE = {
    "AutoConfig": f"{_WAY_IN}--configuration_soap.SOAPConfig",
    "AutoModel": f"{_WAY_IN}--modeling_soap.SOAPModelWrapper",
    "AutoBackbone": f"{_WAY_IN}--modeling_soap.SOAPBackbone",
}
"""What transformers says of a head where nobody has imported this package, instead of that it is out of date.

Of what stands before `--` it says that it has the code that is needed; no repository can have such a name.
"""


def save_head(
    model: Any, folder: str | os.PathLike, include_backbone: bool, figures: Mapping[str, bytes] | None, **kwargs: Any
) -> None:
    """Writes a head into a folder; see [`SOAPModelWrapper.save_pretrained`]."""
    target, keeps_adapter = Path(folder), has_adapter(model) and not include_backbone
    # a backbone that came from inside the head's repository has no other place
    include_backbone = include_backbone or (model.config.backbone_name_or_path or "").startswith("./")
    is_merged = include_backbone and bool(adapted_layers(model.backbone))
    refuse_other_model(target, adapter_too=not keeps_adapter and (is_merged or not _is_at(model, target)))
    if keeps_adapter and _lies_at_base_of_adapter(model):
        with staging_folder(target) as staging:
            return write_adapter(model, staging, _base_of_adapter(model), **kwargs)
    if include_backbone and is_on_module(model):
        raise OutputError(
            f"The backbone is a module of another library, {model.backbone.architecture}, whose code is not known: "
            "save its weights yourself, and the head without include_backbone."
        )
    if not include_backbone and (reason := _what_would_be_lost(model)):
        way = "save its state_dict yourself" if is_on_module(model) else "pass include_backbone=True to keep it"
        logger.warning(f"{reason}: saving the head alone loses that; {way}.")
    loaded, image_processor = model.statistics_by_layer, model.image_processor  # may come from the Hub
    with staging_folder(target, _files_of_earlier_head(target, model.config)) as staging:
        whole = without_adapters(model.backbone, merge=not keeps_adapter) if include_backbone else None
        with _head_alone(model, target, whole):
            PreTrainedModel.save_pretrained(model, staging, save_original_format=False, **kwargs)
        if keeps_adapter:  # in one folder with its head, which has changed since the adapter was loaded
            write_adapter(model, staging, str(target.absolute()), **kwargs)
        for layer, statistics in loaded.items():
            rank = model.config.ranks[model.config.layers.index(layer)]
            path = staging / statistics_file(model.config, layer)
            statistics.save(path, num_components=max(rank, STORED_COMPONENTS))
        if image_processor is not None:
            image_processor.save_pretrained(staging)
        for name, content in (figures or {}).items():
            (staging / FIGURES_FOLDER).mkdir(exist_ok=True)
            (staging / FIGURES_FOLDER / name).write_bytes(content)
        if whole is not None:
            save_backbone(whole, model.config.backbone, staging)
        refresh_card(staging, earlier=target / CARD_FILE)
    model.name_or_path = model.config.name_or_path = str(target)  # where an adapter finds it


def _files_of_earlier_head(target: Path, config: Any) -> tuple[str, ...]:
    """Patterns of the files that an earlier head left in a folder and that are not this one's.

    Evaluations of the same fit stay, since each says at which strength it was made; others are removed, aloud.
    """
    evaluations = f"{EVALUATIONS_FOLDER}/*/*.*"
    if not any(target.glob(evaluations)):
        return OPTIONAL_FILES
    try:
        earlier = json.loads((target / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = {}
    if config.fit is not None and earlier.get("fit") == json.loads(json.dumps(config.fit)):
        return tuple(pattern for pattern in OPTIONAL_FILES if pattern != evaluations)
    logger.warning(f"What {target / EVALUATIONS_FOLDER} holds was measured on an earlier head, and is removed.")
    return OPTIONAL_FILES


def save_backbone(backbone: PreTrainedModel, config: Any, folder: Path) -> None:
    """Writes the backbone of a head, and the `config` that the head keeps of it, into the head's folder."""
    backbone.save_pretrained(folder / BACKBONE_FOLDER)
    if isinstance(config, PretrainedConfig):  # a ViTMAE's view says that nothing is masked
        config.save_pretrained(folder / BACKBONE_FOLDER)


def refer_to_included(config: Any) -> None:
    """Makes a config refer to the backbone beside the head, and remember from where on the Hub that came."""
    reference = config.backbone_name_or_path
    if is_hub_id(reference) and not os.path.isdir(reference):
        config.base_model, config.base_model_revision = reference, config.backbone_revision
    elif reference != INCLUDED_BACKBONE:
        config.base_model = config.base_model_revision = None
    config.backbone_name_or_path, config.backbone_revision = INCLUDED_BACKBONE, None


def _what_would_be_lost(model: Any) -> str | None:
    """Why the weights of the backbone are not found where the head refers to, if they are not."""
    if has_active_adapter(model.backbone) and not has_adapter(model):  # the head's own is written beside it
        return "The backbone carries an adapter"
    found = weight_digests(without_adapters(model.backbone, merge=False))
    if has_other_weights(found, model.weights_when_wrapped):
        return "The backbone's weights have changed since it was put under this head"
    if model.digests_of_reference is None:
        model.digests_of_reference = _digests_of_reference(model.config)
    if has_other_weights(found, model.digests_of_reference):
        return f"The backbone's weights are not those of {model.config.backbone_name_or_path}"
    return None


def _digests_of_reference(config: Any) -> dict[str, str]:
    """Digests of the backbone that a head refers to, as far as it is on this machine; empty if it is not."""
    name, revision = config.backbone_name_or_path, config.backbone_revision
    if name is None or config.plain_backbone is not None:  # making it would run code
        return {}
    try:
        pin = {"revision": revision} if revision else {}
        return weight_digests(load_backbone(name, dtype=config.backbone_dtype, local_files_only=True, **pin))
    except BackboneError as error:
        logger.info(f"Whether the backbone's weights are those of {name} is not known ({first_sentence(error)}).")
        return {}


def _base_of_adapter(model: Any) -> str:
    """Where the head lies that the adapter refers to; an `OutputError` if it was never saved."""
    named = (adapter.base_model_name_or_path for adapter in model.peft_config.values())
    base = next(filter(None, named), None) or model.name_or_path
    if not base:
        raise OutputError(
            "An adapter refers to the head that it was trained on, but this head was never saved; save it before "
            "an adapter is added, or pass include_backbone=True to merge the adapter."
        )
    return str(base)


def _lies_at_base_of_adapter(model: Any) -> bool:
    """Whether the head that the adapter refers to is this one still, so that the adapter alone says everything."""
    base, source = _base_of_adapter(model), model._source
    try:
        record = HeadRecord.open(base, **(source.hub_kwargs if source and source.name_or_path == base else {}))
    except HeadError as error:
        logger.info(f"Whether the head is that of {base} is not known ({first_sentence(error)}).")
        return False
    same = ("layers", "layouts", "method", "mu", "tau", "threshold", "checks")
    if any(getattr(record.config, name) != getattr(model.config, name) for name in same):
        return False
    parts = [(single, model.projections[str(layer)]) for layer, single in record.projections.items()]
    return all(
        torch.equal(there.basis, here.basis.cpu()) and torch.equal(there.weights, here.weights.cpu())
        for there, here in parts
    )


def _is_at(model: Any, folder: Path) -> bool:
    """Whether a folder is where a head was loaded from, or saved to."""
    return bool(model.name_or_path) and os.path.realpath(model.name_or_path) == os.path.realpath(folder)


def refuse_other_model(folder: Path, adapter_too: bool = True) -> None:
    """Refuses to write a head over a backbone or any other model, or beside an adapter that is not its own."""
    if (folder / ADAPTER_FILE).exists() and adapter_too:
        raise OutputError(
            f"{folder} holds an adapter, which would be put on the head too; choose another folder, or remove its "
            f"{ADAPTER_FILE}."
        )
    config = folder / CONFIG_FILE
    try:
        values = json.loads(config.read_text(encoding="utf-8")) if config.exists() else None
    except ValueError:
        values = {}
    if values is not None and not is_head_config(values):
        found = values.get("model_type") if isinstance(values, dict) else None
        raise OutputError(f"{folder} holds another model ({found}), which a head would overwrite; choose another.")


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
def _head_alone(model: Any, target: Path, included: PreTrainedModel | None) -> Iterator[None]:
    """Within the block, the backbone's weights are left out, and the config refers to it as `target` should."""
    live = model.config
    # only now: a model that holds this one as a part must save the backbone's weights, or it would lose them
    model._keys_to_ignore_on_save = {f"backbone.{name}" for name in model.backbone.state_dict()}
    model.config = copy.deepcopy(live)
    model.config.auto_map = dict(WITHOUT_CODE)  # the code of a pushed head stays where it came from
    adapted, model._hf_peft_config_loaded = has_adapter(model), False
    if included is not None:
        refer_to_included(model.config)
        model.config.backbone_digests = weight_digests(included)
    elif live.backbone_name_or_path:
        model.config.base_model = model.config.base_model_revision = None
        model.config.backbone_name_or_path = relative_reference(live.backbone_name_or_path, target)
    try:
        yield
    finally:
        model.config, model._hf_peft_config_loaded = live, adapted
        model._keys_to_ignore_on_save = set()
