"""Loading and saving a head: the part of the wrapper that knows files and the Hub."""

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import logging

from .backbones import bare_backbone, differ, load_backbone, resolve_commit, weight_samples
from .configuration_soap import SOAPConfig
from .errors import HeadError, OutputError, first_sentence
from .head_files import (
    BACKBONE_FOLDER,
    FIGURES_FOLDER,
    HUB_KWARGS,
    INCLUDED_BACKBONE,
    OPTIONAL_FILES,
    PROCESSOR_FILE,
    HeadSource,
    check_same_architecture,
    read_config,
    read_json,
    read_projections,
    read_statistics,
    relative_reference,
    statistics_file,
)
from .soap_statistics import STORED_COMPONENTS, SOAPStatistics
from .tensor_files import staging_folder

logger = logging.get_logger(__name__)


class SavedHead(PreTrainedModel):
    """A model that is saved as a head alone and loads its backbone by reference.

    Beside the weights a head may carry the statistics of its fit and the backbone's image processor; both are read
    when first asked for.
    """

    config: SOAPConfig
    backbone: PreTrainedModel

    def _remember_backbone(self) -> None:
        """Notes what the backbone's weights are like."""
        self._backbone_state = weight_samples(self.backbone)
        self._statistics: dict[int, SOAPStatistics] = {}
        self._image_processor: Any = None
        self._source: HeadSource | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        config: SOAPConfig | None = None,
        backbone: PreTrainedModel | str | None = None,
        backbone_revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Loads a head, and the backbone it refers to.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): folder or hub id of the head.
            config ([`SOAPConfig`], *optional*): read from the head if not given.
            backbone (`PreTrainedModel` or `str`, *optional*): another copy of the backbone: a live model (which stays
                in the mode it is in), hub id or folder.
            backbone_revision (`str`, *optional*): branch, tag or commit of the backbone; default: the one that the
                head was fitted on. Another one warns; of a live model nobody knows it.
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download` and `subfolder` reach the
                head; everything else (`dtype`, `device_map`, `attn_implementation`, `quantization_config`,
                `trust_remote_code`, …) loads the backbone. Without `dtype` the backbone is loaded in the dtype that
                the head was fitted in.

        Returns:
            The model, in evaluation mode.

        Raises:
            HeadError: the head is missing or malformed, or does not fit the backbone.
            BackboneError: the backbone cannot be loaded.
        """
        hub_kwargs = {name: kwargs.pop(name) for name in HUB_KWARGS if kwargs.get(name) is not None}
        for name in (*HUB_KWARGS, "_from_auto", "_from_pipeline", "adapter_kwargs", "_commit_hash"):
            kwargs.pop(name, None)
        with_loading_info = kwargs.pop("output_loading_info", False)
        source = HeadSource.at_one_commit(os.fspath(pretrained_model_name_or_path), hub_kwargs)
        config = read_config(source) if config is None else copy.deepcopy(config)
        projections = read_projections(source, config)
        if isinstance(backbone, PreTrainedModel):
            live = bare_backbone(backbone)
        else:
            is_its_own = backbone in (None, config.backbone_name_or_path)
            reference, pin = source.backbone_reference(config) if is_its_own else (str(backbone), {})
            reach = {name: value for name, value in hub_kwargs.items() if name not in ("revision", "subfolder")}
            if backbone_revision is not None:
                pin["revision"] = resolve_commit(reference, backbone_revision, **reach)
                _warn_of_another_revision(config.backbone_revision if is_its_own else None, pin["revision"])
            live = load_backbone(reference, **reach, **pin, **_backbone_kwargs(config, kwargs))
            if "subfolder" not in pin:  # else the backbone lies inside the head's repository, and is saved with it
                config.backbone_name_or_path, config.backbone_revision = reference, pin.get("revision")
        check_same_architecture(config.backbone, live.config)
        model = cls(config, live, {layer: single.to(live.device) for layer, single in projections.items()})
        model._source = source
        with suppress(HeadError):  # small, and wanted offline too
            source.fetch_if_there(PROCESSOR_FILE)
        if isinstance(backbone, PreTrainedModel):  # stays in the mode it is in
            model.training = live.training
        else:
            model.eval()
        complete: dict[str, Any] = {key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        return (model, complete) if with_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        include_backbone: bool = False,
        figures: Mapping[str, bytes] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the head: `config.json`, `model.safetensors`, `statistics.safetensors`, `preprocessor_config.json`.

        Everything is written beside the target and moved there at the end, so that no half-written head is left.

        Args:
            save_directory (`str` or `os.PathLike`): the head's folder.
            is_main_process (`bool`, defaults to `True`): only the main process writes.
            state_dict (`dict`, *optional*): taken instead of the model's own (Trainer passes it).
            include_backbone (`bool`, defaults to `False`): write the backbone into the folder as well, so that it
                needs nothing else.
            figures (`dict[str, bytes]`, *optional*): PNG files by name, for the folder `figures`; those of an earlier
                head are removed.
            kwargs: handed to `PreTrainedModel.save_pretrained`.

        Raises:
            OutputError: the folder cannot be written.
        """
        if not is_main_process:
            return
        if kwargs.pop("push_to_hub", False):
            raise OutputError("Saving does not push; save first, then call model.push_to_hub(…).")
        target = Path(save_directory)
        refuse_other_model(target)
        # a backbone that came from inside the head's repository has no other place
        include_backbone = include_backbone or (self.config.backbone_name_or_path or "").startswith("./")
        if not include_backbone and differ(self._backbone_state, weight_samples(self.backbone)):
            logger.warning(
                "The backbone's weights have changed since it was put under this head, and saving writes the head "
                "alone: they will be lost. Pass include_backbone=True to keep them."
            )
        loaded, image_processor = self.statistics_by_layer, self.image_processor  # may come from the Hub
        with staging_folder(target, OPTIONAL_FILES) as staging:
            with self._head_alone(target, include_backbone):
                super().save_pretrained(staging, state_dict=state_dict, save_original_format=False, **kwargs)
            for layer, statistics in loaded.items():
                rank = self.config.ranks[self.config.layers.index(layer)]
                path = staging / statistics_file(self.config, layer)
                statistics.save(path, num_components=max(rank, STORED_COMPONENTS))
            if image_processor is not None:
                image_processor.save_pretrained(staging)
            for name, content in (figures or {}).items():
                (staging / FIGURES_FOLDER).mkdir(exist_ok=True)
                (staging / FIGURES_FOLDER / name).write_bytes(content)
            if include_backbone:
                self.backbone.save_pretrained(staging / BACKBONE_FOLDER)
                if isinstance(self.config.backbone, PretrainedConfig):  # a ViTMAE's view says that nothing is masked
                    self.config.backbone.save_pretrained(staging / BACKBONE_FOLDER)
            _write_card(staging, target)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Pushes the head in one commit: config, weights, statistics, image processor, code and card.

        Args:
            repo_id (`str`): the repository, e.g. `"me/soap-vit-mae-base"`; made if it is not there.
            options: `backbone_id`, `include_backbone`, `statistics`, `private`, `revision`, `create_pr`,
                `commit_message`, `license`, `force`, `token`: see [`~soap_hf.hub.Push`].

        Returns:
            Address of the commit, or of the pull request.

        Raises:
            HubError: the head's backbone is a local folder or in memory, the repository cannot be written or holds
                something else, or the network failed; then the head is in a folder that the message names.
            HeadError: this code came from the Hub, and soap-hf is not installed.
        """
        try:
            from soap_hf.hub import push_model
        except ImportError as error:
            raise HeadError("Pushing a head needs the package; run pip install soap-hf.") from error
        return push_model(self, repo_id, **options)

    @property
    def statistics(self) -> SOAPStatistics | dict[int, SOAPStatistics]:
        """What the fit learned, read from beside the head when first asked for; a dict by layer for several layers.

        Raises:
            HeadError: the head was saved without statistics.
        """
        statistics = self.statistics_by_layer
        if not statistics:
            raise HeadError("This head was saved without statistics; fit it again to have them.")
        return statistics if len(self.config.layers) > 1 else statistics[self.config.layers[0]]

    @property
    def statistics_by_layer(self) -> dict[int, SOAPStatistics]:
        """As `statistics`, always by layer; empty if the head was saved without."""
        if not self._statistics and self._source is not None:
            self._statistics = read_statistics(self._source, self.config)
        return self._statistics

    def set_statistics(self, statistics: Mapping[int, SOAPStatistics]) -> "SavedHead":
        """Attaches the statistics of each layer; returns itself. The projections stay as they are until `reweight`."""
        if set(statistics) != set(self.config.layers):
            raise HeadError(
                f"Statistics of layers {list(statistics)} do not fit a head of layers {self.config.layers}."
            )
        self._statistics = dict(statistics)
        return self

    @property
    def image_processor(self) -> Any:
        """The image processor saved beside the head, or `None`.

        Raises:
            HeadError: it cannot be read, or needs code of its own.
        """
        source = self._source
        if self._image_processor is None and source is not None and (path := source.fetch_if_there(PROCESSOR_FILE)):
            read_json(path, f"image processor of the head {source.name_or_path!r}")
            try:  # False: unset, transformers would ask on the terminal whether to run code
                self._image_processor = AutoImageProcessor.from_pretrained(
                    source.name_or_path, trust_remote_code=False, **source.hub_kwargs
                )
            except Exception as error:  # transformers raises whatever a value of another kind leads to
                raise HeadError(
                    f"The image processor of the head {source.name_or_path!r} cannot be used "
                    f"({first_sentence(error)}); mend or remove its {PROCESSOR_FILE}."
                ) from error
        return self._image_processor

    @contextmanager
    def _head_alone(self, target: Path, include_backbone: bool) -> Iterator[None]:
        """Within the block, the backbone's weights are left out, and `self.config` refers to it as `target` should."""
        live = self.config
        # only now: a model that holds this one as a part must save the backbone's weights, or it would lose them
        self._keys_to_ignore_on_save = {f"backbone.{name}" for name in self.backbone.state_dict()}
        self.config = copy.deepcopy(live)
        self.config.__dict__.pop("auto_map", None)  # the code that it names stays where it came from
        if include_backbone:
            self.config.backbone_name_or_path, self.config.backbone_revision = INCLUDED_BACKBONE, None
        elif live.backbone_name_or_path:
            self.config.backbone_name_or_path = relative_reference(live.backbone_name_or_path, target)
        try:
            yield
        finally:
            self.config = live
            self._keys_to_ignore_on_save = set()


def _backbone_kwargs(config: SOAPConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What loads the backbone: the caller's own words first, then what AutoModel has put into the head's config."""
    chosen = dict(kwargs)
    dtype = chosen.pop("dtype", None) or chosen.pop("torch_dtype", None)
    chosen["dtype"] = config.backbone_dtype or "auto" if dtype in (None, "auto") else dtype
    if config._attn_implementation is not None:
        chosen.setdefault("attn_implementation", config._attn_implementation)
    # False: unset, transformers would ask on the terminal whether to run code that a stranger's head refers to
    return {"trust_remote_code": False} | {name: value for name, value in chosen.items() if value is not None}


def _warn_of_another_revision(pinned: str | None, commit: str | None) -> None:
    if pinned is not None and pinned != commit:
        logger.warning(
            f"The head was fitted on revision {pinned} of its backbone, and is put on revision {commit}: its "
            "directions may mean something else there."
        )


def refuse_other_model(folder: Path) -> None:
    """Refuses to write a head over a backbone, or over any other model."""
    config = folder / "config.json"
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.exists() else "soap"
    except (ValueError, AttributeError):
        model_type = None
    if model_type != SOAPConfig.model_type:
        raise OutputError(
            f"{folder} holds another model ({model_type}), which a head would overwrite; choose another."
        )


def _write_card(staging: Path, target: Path) -> None:
    """Writes the model card, or the next version of the one in `target`."""
    try:
        from soap_hf.model_card import CARD_FILE, write_card
    except ImportError:  # this code came from the Hub, and the package is not installed
        return
    card = target / CARD_FILE
    old = card.read_text(encoding="utf-8") if card.exists() else None
    write_card(read_config(HeadSource(os.fspath(staging))), staging, name=target.name, old=old)
