"""A head in Python: put on a backbone, saved, pushed, described by its statistics, and given another strength."""

import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from ..compat import AutoImageProcessor
from ..data.arguments import refuse_negative_mu
from ..layout.backbone import OpenedBackbone
from ..layout.detection import PatchLayout
from ..layout.plain import name_of
from ..notebooks import html_of, printable
from ..runtime import modeling_soap
from ..runtime.errors import HeadError, OutputError, first_sentence
from ..runtime.head_files import HUB_KWARGS, PROCESSOR_FILE, HeadSource, read_json
from ..runtime.patch_layout import Pooling, as_size
from ..runtime.projection import SOAPProjection
from ..runtime.vision_backbone import weight_digests
from ..statistics.semantic_invariance import Mu
from ..statistics.soap_statistics import SOAPStatistics
from .adapters import adapted_layers, without_adapters
from .config import SOAPConfig
from .encoding import encode
from .hub import push_model
from .opening import read_statistics
from .plain import opened_for_head, put_on_module, put_on_transformers
from .provenance import SOAP, all_values, check_provenance
from .report import report
from .saving import save_head

logger = logging.get_logger(__name__)


class SOAPModelWrapper(modeling_soap.SOAPModelWrapper):
    """A vision backbone whose patch tokens come out clean (arXiv 2604.00172).

    The head removes directions from the patch tokens of the layers it was fitted on; everything else passes through as
    the backbone made it. Cleaning never feeds later blocks: with `layer=i`, `hidden_states[i]` comes out clean and
    `last_hidden_state` as it was.

    Saving writes the head alone; the backbone is referenced by hub id or folder and loaded again from there. The
    statistics of the fit and the backbone's image processor may lie beside it, and are read when first asked for.

    Args:
        config ([`SOAPConfig`]): the head's configuration.
        backbone (`PreTrainedModel`, *optional*): the live backbone; without it one is built from `config.backbone`,
            with random weights, as `from_config` does.
        projections (`dict[int, SOAPProjection]`, *optional*): one for each of `config.layers`; default: identities.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTModel
        >>> from soap_hf import SOAPModelWrapper, SOAPProjection
        >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        ...                          image_size=32, patch_size=8)).eval()
        >>> direction = torch.eye(8)[:, :1]
        >>> model = SOAPModelWrapper.from_backbone(vit, SOAPProjection(direction, torch.ones(1)))
        >>> tokens = model(torch.zeros(1, 3, 32, 32)).last_hidden_state  # (batch, CLS + patches, width)
        >>> tokens.shape, bool(tokens[0, 1:, 0].abs().max() < 1e-6)
        (torch.Size([1, 17, 8]), True)
    """

    config_class = SOAPConfig
    layout_class = PatchLayout

    def __init__(
        self,
        config: SOAPConfig,
        backbone: PreTrainedModel | None = None,
        projections: Mapping[int, SOAPProjection] | None = None,
    ):
        check_provenance(config)
        super().__init__(config, backbone, projections)
        if adapted_layers(self.backbone):
            self.weights_when_wrapped = weight_digests(without_adapters(self.backbone))
        self.digests_of_reference: dict[str, str] | None = config.backbone_digests  # `None`: nobody has looked
        self._statistics: dict[int, SOAPStatistics] = {}
        self._image_processor: Any = None

    @staticmethod
    def _find_backbone(source: HeadSource, config: SOAPConfig, given: Any, revision: str | None, kwargs: Any) -> Any:
        """As the runtime's, or a module of another library: live, by reference, or as the head says it was made."""
        opened = opened_for_head(config, given, kwargs, source.name_or_path)
        if opened is not None:
            return put_on_module(config, opened)
        live = modeling_soap.SOAPModelWrapper._find_backbone(source, config, given, revision, kwargs)
        return live if config.plain_backbone is None else put_on_transformers(config, live, _config_copy(live))

    @classmethod
    def from_backbone(
        cls,
        backbone: nn.Module | OpenedBackbone | str | os.PathLike,
        projection: SOAPProjection | Mapping[int, SOAPProjection | None] | None,
        *,
        name_or_path: str | None = None,
        revision: str | None = None,
        layout: PatchLayout | Mapping[int, PatchLayout] | None = None,
        layer: int = -1,
        image_size: int | tuple[int, int] | None = None,
        image_processor: Any = None,
        statistics: SOAPStatistics | Mapping[int, SOAPStatistics] | None = None,
        tokens: str | Callable[[Tensor], Any] | None = None,
    ) -> "SOAPModelWrapper":
        """Puts a projection on a backbone.

        Args:
            backbone (`nn.Module` or `str`): live model (shared, and left as it is), of transformers or any other
                library; hub id or folder.
            projection ([`SOAPProjection`], or a dict of them by layer): what to remove; `None` removes nothing.
            name_or_path (`str`, *optional*): where the backbone is found again; default: where the model came from.
            revision (`str`, *optional*): commit of the backbone.
            layout ([`PatchLayout`], or a dict of them by layer, *optional*): found if not given.
            layer (`int`, defaults to -1): which tensor a single projection belongs to.
            image_size (`int` or `(height, width)`, *optional*): to look at the backbone; default: as in
                [`PatchLayout.detect`].
            image_processor (*optional*): saved beside the head.
            statistics ([`SOAPStatistics`], or a dict of them by layer, *optional*): the same; `reweight` needs them.
            tokens (`str` or callable, *optional*): of a module of another library, where its patch tokens are, as in
                [`fit_soap`]; found if not given.

        Raises:
            BackboneError: the backbone cannot be loaded or has no patch tokens.
            LayoutError: its patch tokens were not found.
            HeadError: the projection has another width than the tokens.
        """
        if isinstance(backbone, (str, os.PathLike)):
            backbone = OpenedBackbone.load(backbone, revision=revision, tokens=tokens)
        if not isinstance(backbone, OpenedBackbone):
            size = as_size(image_size)
            backbone = OpenedBackbone(backbone, name_or_path, revision, tokens=tokens, size=size)
        live = backbone.model
        wanted = dict(projection) if isinstance(projection, Mapping) else {layer: projection}
        given = dict(layout) if isinstance(layout, Mapping) else {} if layout is None else {layer: layout}
        layouts, widths = backbone.layouts(wanted, as_size(image_size), given)
        projections: dict[int, SOAPProjection] = {}
        for key, single in wanted.items():
            width = widths[key]
            projections[key] = SOAPProjection.identity(width) if single is None else single
            if projections[key].dim != width:
                raise HeadError(
                    f"The projection is for tokens of width {projections[key].dim}, but those of layer {key} of "
                    f"{name_of(live)} have width {width}; fit a head for this backbone and layer."
                )
        config = SOAPConfig(
            backbone=_config_copy(live),
            backbone_name_or_path=_lasting_reference(name_or_path or backbone.name_or_path),
            backbone_revision=revision or backbone.revision,
            backbone_dtype=str(live.dtype).removeprefix("torch."),
            plain_backbone=backbone.plain,
            layers=list(projections),
            hidden_sizes=[single.dim for single in projections.values()],
            ranks=[single.rank for single in projections.values()],
            layouts=[single.to_dict() for single in layouts.values()],
        )
        model = cls(config, live, {key: single.to(live.device) for key, single in projections.items()})
        model._image_processor = image_processor
        config.backbone_digests = model.weights_when_wrapped
        model.digests_of_reference = config.backbone_digests if backbone.is_as_referred else None
        if statistics is not None:
            model.set_statistics(statistics if isinstance(statistics, Mapping) else {layer: statistics})
        model.training = live.training  # not train(): it would put every part of a live backbone in this mode
        return model

    def __repr__(self) -> str:
        config, stages = self.config, []
        for layer, rank, size in zip(config.layers, config.ranks, config.hidden_sizes, strict=True):
            stages.append(f"{rank} of {size} directions" + (f" of layer {layer}" if layer >= 0 else ""))
        what = f"{', '.join(stages)} removed, mu={config.mu}" if self._cleaning else "disabled"
        where = config.backbone_name_or_path or "in memory"
        dtype = str(self.dtype).removeprefix("torch.")
        name = f"{type(self).__name__}({name_of(self.backbone)} {where}: {what}, {dtype} on {self.device})"
        return printable(name)

    def _repr_html_(self) -> str:
        return html_of(repr(self), *report(self.config))

    def reweight(self, mu: Mu = "auto", tau: float = 0.05, threshold: float = 0.75) -> "SOAPModelWrapper":
        """Another strength, from the stored statistics and without a new fit; returns itself.

        The arguments are those of `suppression_weights`.

        Raises:
            HeadError: the head was saved without statistics.
            SOAPError: an argument is out of range, `mu` below 0 for one.
        """
        refuse_negative_mu(mu)
        if not self.statistics_by_layer:
            raise HeadError("This head was saved without statistics, which reweight needs; fit it again.")
        mu = int(mu) if isinstance(mu, float) and mu.is_integer() else mu  # 6.0 and 6 are one strength
        chosen = {layer: self._statistics[layer].projection(mu, tau, threshold) for layer in self.config.layers}
        if (mu, tau, threshold) != (self.config.mu, self.config.tau, self.config.threshold):
            self.config.checks = []  # they are of the strength before
        self.set_projections(chosen)
        self.config.mu, self.config.tau, self.config.threshold = mu, tau, threshold
        self.config.components = [self._statistics[layer].table(mu, tau, threshold) for layer in self.config.layers]
        return self

    def set_projections(self, projections: Mapping[int, SOAPProjection], *, method: str = SOAP) -> "SOAPModelWrapper":
        """Has the head remove something else, one projection for each of its layers; returns itself.

        `method` names it in the config; of another one than SOAP, no component has a weight.
        """
        for layer, projection in projections.items():
            self.projections[str(layer)] = projection.to(self.device)
            if projection.rank > projection.dim / 2:
                of_all = f"{projection.rank} of the {projection.dim} directions of layer {layer}"
                logger.warning(f"{of_all} are removed, which leaves little of the tokens; choose fewer.")
        if method != SOAP or method != self.config.method:
            self.config.checks = []  # they are of what was removed before
            rows = [[{**row, "weight": 0.0} for row in rows] for rows in self.config.components]
            self.config.components = rows
        self.config.method, self.config.ranks = method, [one.rank for one in projections.values()]
        return self

    @property
    def statistics(self) -> SOAPStatistics | dict[int, SOAPStatistics]:
        """What the fit learned, a dict by layer for several layers; a `HeadError` if the head was saved without."""
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

    def set_statistics(self, statistics: Mapping[int, SOAPStatistics]) -> "SOAPModelWrapper":
        """Attaches the statistics of each layer; returns itself. The projections stay as they are until `reweight`."""
        layers = self.config.layers
        if set(statistics) != set(layers):
            raise HeadError(f"Statistics of layers {list(statistics)} do not fit a head of layers {layers}.")
        self._statistics = dict(statistics)
        return self

    @property
    def image_processor(self) -> Any:
        """The image processor saved beside the head, or `None`; a `HeadError` if it cannot be used."""
        source = self._source
        if self._image_processor is None and source is not None and (path := source.fetch_if_there(PROCESSOR_FILE)):
            all_values(read_json(path, f"image processor of the head {source.name_or_path!r}"))
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

    def encode(  # type: ignore[override]
        self,
        images: Any,
        *,
        batch_size: int = 32,
        pooling: Pooling | None = "mean",
        normalize: bool = False,
        image_size: int | tuple[int, int] | None = None,
        image_column: str = "image",
        as_tensor: bool = False,
        progress: bool = True,
    ) -> np.ndarray | Tensor:
        """One vector per image, or its clean patch tokens, without gradients and in the order of the images.

        Args:
            images: a path, a PIL image or an array `(H, W, 3)` uint8; a list of those; a folder, a data set's name on
                the Hub, or a data set of `datasets` or torch.
            batch_size (`int`, defaults to 32): images in a forward pass.
            pooling (`str`, *optional*, defaults to `"mean"`): of the clean patches, `"cls"`, or `"cls+mean"`; `None`
                gives the patch tokens.
            normalize (`bool`, defaults to `False`): to length 1.
            image_size (`int` or `(height, width)`, *optional*): the model's input size; default: the processor's.
            image_column (`str`, defaults to `"image"`): of a data set, the column that holds the images.
            as_tensor (`bool`, defaults to `False`): a tensor of torch, on the CPU, instead of an array of numpy.
            progress (`bool`, defaults to `True`): show a bar.

        Returns:
            float32 of shape `(N, D)`, `(N, 2 * D)` for `"cls+mean"`, `(N, *grid, D)` without pooling; for one image
            without the `N`. The tokens are those of the last layer of the head.

        Raises:
            DataError: an image cannot be read, or is none; names it.
            LayoutError: the backbone has no CLS token, or there is no such pooling.

        Example:
            >>> from PIL import Image
            >>> from transformers import ViTConfig, ViTModel
            >>> from soap_hf import SOAPModelWrapper
            >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            ...                          intermediate_size=8, image_size=32, patch_size=8))
            >>> model = SOAPModelWrapper.from_backbone(vit, None)
            >>> photos = [Image.new("RGB", (40, 30), (60 * i, 0, 0)) for i in range(3)]
            >>> model.encode(photos, normalize=True, progress=False).shape
            (3, 8)
            >>> model.encode(photos[0], pooling=None).shape
            (4, 4, 8)
        """
        how: Any = {"batch_size": batch_size, "pooling": pooling, "normalize": normalize, "image_size": image_size}
        return encode(self, images, image_column=image_column, as_tensor=as_tensor, progress=progress, **how)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        include_backbone: bool = False,
        figures: Mapping[str, bytes] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the head: `config.json`, `model.safetensors`, `statistics.safetensors`, `preprocessor_config.json`.

        Everything is written beside the target and moved there at the end, so that no half-written head is left. If an
        adapter was added to the head, or loaded with it, it alone is written, as transformers does, active or not; it
        refers to the head. Has the head changed since, by `reweight` say, it is written into the same folder.

        Args:
            save_directory (`str` or `os.PathLike`): the head's folder.
            include_backbone (`bool`, defaults to `False`): write the backbone as well, so that nothing else is needed;
                adapters are merged into it, but for those that are disabled.
            figures (`dict[str, bytes]`, *optional*): PNG files by name, instead of those of an earlier head.
            is_main_process, state_dict, kwargs: as in `PreTrainedModel.save_pretrained`.

        Raises:
            OutputError: the folder cannot be written, or holds another model or adapter; an adapter cannot be merged.
        """
        if kwargs.pop("push_to_hub", False):
            raise OutputError("Saving does not push; save first, then call model.push_to_hub(…).")
        if is_main_process:
            save_head(self, save_directory, include_backbone, figures, state_dict=state_dict, **kwargs)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # type: ignore[override]
        """Pushes the head in one commit: config, weights, statistics, image processor, code and card.

        Args:
            repo_id (`str`): the repository, e.g. `"me/soap-vit-mae-base"`; made if it is not there.
            options: the other fields of [`~soap_hf.heads.hub.Push`], e.g. `include_backbone`, `private`, `token`.

        Returns:
            Address of the commit, or of the pull request.

        Raises:
            HubError: see [`~soap_hf.heads.hub.push_head`]; if the network failed, it names the folder with the head.
        """
        return push_model(self, repo_id, **options)


class SOAPBackbone(modeling_soap.SOAPBackbone, SOAPModelWrapper):
    """A vision backbone whose clean patch tokens come out as feature maps, a stage for each layer of the head.

    Stages are named `layer<i>`, and `last` for `last_hidden_state`; `out_features` or `out_indices`, of the config or
    of `from_pretrained`, choose among them (default: all, in the order of the head). The same head loads as
    [`SOAPModelWrapper`] too. `AutoBackbone.from_pretrained` loads it by hub id; given a folder it fails for every
    model of transformers.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTModel
        >>> vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        ...                          image_size=32, patch_size=8)).eval()
        >>> projection = SOAPProjection(torch.eye(8)[:, :1], torch.ones(1))
        >>> backbone = SOAPBackbone.from_backbone(vit, {1: None, -1: projection})
        >>> backbone.out_features, backbone.channels
        (['layer1', 'last'], [8, 8])
        >>> [tuple(stage.shape) for stage in backbone(torch.zeros(2, 3, 32, 64)).feature_maps]
        [(2, 8, 4, 8), (2, 8, 4, 8)]
    """

    config_class = SOAPConfig  # transformers gives each class below one of its own
    layout_class = PatchLayout

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args: Any,
        config: SOAPConfig | None = None,
        out_features: list[str] | None = None,
        out_indices: list[int] | tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As [`SOAPModelWrapper`]'s, with the stages to give, by name or by number; default: those of the config.

        Raises:
            HeadError: there is no such stage, or they are not in the order of the head; before anything is loaded.
        """
        if out_features is not None or out_indices is not None:
            hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
            source = HeadSource.open(pretrained_model_name_or_path, **hub_kwargs)
            config = (source.base_of_adapter() or source).config(SOAPConfig) if config is None else deepcopy(config)
            try:
                config.set_output_features_output_indices(out_features, out_indices)
            except (ValueError, IndexError) as error:
                raise HeadError(
                    f"The stages of the head {source.name_or_path!r} are {', '.join(config.stage_names)}, in this "
                    f"order; choose among them ({first_sentence(error)})."
                ) from error
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)


def _lasting_reference(name: str | None) -> str | None:
    """A hub id as it is; a folder with its whole path, since the working directory may change."""
    return os.path.abspath(name) if name and os.path.isdir(name) else name or None


def _config_copy(backbone: PreTrainedModel) -> Any:
    """The backbone's config without its path, which may be private; `None` if transformers does not know the type."""
    if backbone.config.model_type not in CONFIG_MAPPING:
        return None
    config = deepcopy(backbone.config)
    config._name_or_path = ""
    config.architectures = [type(backbone).__name__]
    return config
