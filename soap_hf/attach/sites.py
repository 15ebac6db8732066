"""Where in a model a head belongs: the modules whose outputs hold its tokens, as the rest of the model reads them."""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from ..heads.config import SOAPConfig
from ..heads.model import SOAPModelWrapper
from ..heads.opening import HeadRecord
from ..heads.plain import check_sizes, fitted_size, warn_if_other_tokens
from ..layout.backbone import OpenedBackbone
from ..layout.detection import PatchLayout
from ..layout.plain import architecture_of
from ..layout.probing import Probe, at_first_size, probe_size, probe_sizes
from ..layout.tokens import module_that_makes
from ..runtime.errors import BackboneError, HeadError, LayoutError
from ..runtime.head_files import check_same_architecture
from ..runtime.projection import SOAPProjection
from ..runtime.vision_backbone import is_inside, native_image_size, takes_pixels, warn_of_other_weights, weight_digests
from .hosts import Host, Inputs, depends, find_towers, image_size_of, map_tokens, states_source

logger = logging.get_logger(__name__)


@dataclass
class Site:
    """A module whose output holds the tokens of one layer of a head, and the hook that cleans them there."""

    module: nn.Module = field(repr=False)
    layer: int
    place: int  # which tensor of the module's output, as in `map_tokens`
    layout: PatchLayout
    projection: SOAPProjection

    def __call__(self, module: nn.Module, arguments: Any, outputs: Any) -> Any:
        return map_tokens(outputs, self.place, lambda tokens: self.layout.map_patches(tokens, self.projection))

    def disturb(self, tokens: Tensor) -> Tensor:
        """The tensor with noise on its patch tokens."""
        generator = torch.Generator().manual_seed(0)

        def add_noise(patches: Tensor) -> Tensor:
            return patches + torch.randn(patches.shape, generator=generator).to(patches) * patches.std()

        return self.layout.map_patches(tokens, add_noise)

    def is_same(self, other: "Site") -> bool:
        """Whether another site removes the same from the same tensor of its module's output."""
        parts = zip(self.projection.buffers(), other.projection.buffers(), strict=True)
        return self.place == other.place and all(torch.equal(one.cpu(), its.cpu()) for one, its in parts)


@dataclass(frozen=True)
class GivenHead:
    """What is known of a head: a bare projection comes without layouts and config."""

    projections: dict[int, SOAPProjection]
    layouts: dict[int, PatchLayout]
    config: SOAPConfig | None

    @classmethod
    def read(
        cls, head: Any, layer: int | None, layout: PatchLayout | None, revision: str | None, token: str | bool | None
    ) -> "GivenHead":
        """Takes a head in any of its forms; `layer` chooses one of several, `layout` overrides its own."""
        if isinstance(head, SOAPProjection):
            layer = -1 if layer is None else layer
            return cls({layer: head}, {} if layout is None else {layer: layout}, None)
        if isinstance(head, SOAPModelWrapper):
            config = head.config
            projections: dict[int, Any] = {one: head.projections[str(one)] for one in config.layers}
        elif isinstance(head, (str, os.PathLike)):
            record = HeadRecord.open(head, revision=revision, token=token)
            config, projections = record.config, dict(record.projections)
        else:
            raise HeadError(
                f"A head is a folder, a hub id, a SOAPModelWrapper or a SOAPProjection, not {type(head).__name__}."
            )
        if layer is not None and layer not in projections:
            raise HeadError(f"The head has no layer {layer}; it was fitted on {config.layers}.")
        layers = config.layers if layer is None else [layer]
        declared = dict(zip(config.layers, config.layouts, strict=True))
        layouts = {one: layout or PatchLayout.from_dict(declared[one]) for one in layers}
        return cls({one: projections[one] for one in layers}, layouts, config)

    def site(self, module: nn.Module, layer: int, place: int, layout: PatchLayout) -> Site:
        """A site of one layer; its projection is a copy on the module's device."""
        parameter = next(module.parameters(), None)
        projection = copy.deepcopy(self.projections[layer])
        return Site(module, layer, place, layout, projection.to("cpu" if parameter is None else parameter.device))


def find_sites(model: nn.Module, module: str, head: GivenHead, inputs: Inputs | None) -> tuple[str, list[Site], Host]:
    """Where a head belongs in a model, checked to hold tokens of its width and layout.

    Gives the path of the vision backbone or of the module named, the sites, and the model to be run: with `inputs`,
    else on an image of a few patches, or of native size if the model takes no others.
    """
    towers = find_towers(model)
    of_transformers = any(isinstance(tower, PreTrainedModel) for tower in towers.values())
    if module == "auto" and not of_transformers and (sites := _module_sites(model, head, inputs)) is not None:
        return sites
    path = _only_tower(model, towers, head) if module == "auto" else module
    name = type(model).__name__
    try:
        target = model.get_submodule(path)
    except AttributeError as error:
        raise BackboneError(f"{name} has no module {path!r}; model.named_modules() lists them.") from error
    if isinstance(target, PreTrainedModel) and takes_pixels(target):
        _check_tower(model, target, head)
        sizes, around = probe_sizes(target), target
    else:
        around = next((tower for above, tower in towers.items() if is_inside(path, above)), None)
        fitted_on: Any = head.config and head.config.backbone
        usual = (fitted_on and native_image_size(fitted_on)) or (head.config and fitted_size(head.config))
        sizes = probe_sizes(around) if isinstance(around, PreTrainedModel) else [usual or (224, 224)]
    if inputs is not None:
        sizes = [image_size_of(inputs) or sizes[-1]]

    def look(size: tuple[int, int]) -> tuple[str, list[Site], Host]:
        host = Host(model, size, inputs)
        if target is not around:
            return path, [_plain_site(host, path, target, head)], host
        is_small = size != sizes[-1]
        found = _tower_sites(path, target, head, size, PatchLayout.settled if is_small else PatchLayout.from_probe)
        if is_small:
            host.run({})  # the tower takes a small image, but the rest of the model may not
        return path, found, host

    found = at_first_size(sizes, look)
    what = "inputs=…" if inputs is not None else "an image of noise of {} x {} pixels".format(*found[2].size)
    logger.info(f"{name} is looked at with {what}.")
    return found


def _only_tower(model: nn.Module, towers: dict[str, nn.Module], head: GivenHead) -> str:
    """Path of the only vision backbone of the head's type, else of the only one."""
    kind: Any = getattr(head.config and head.config.backbone, "model_type", None)
    kinds = {path: getattr(getattr(tower, "config", None), "model_type", None) for path, tower in towers.items()}
    found = {path: tower for path, tower in towers.items() if kinds[path] == kind} or towers
    if not found:
        raise BackboneError(
            f"{type(model).__name__} holds no vision backbone of transformers or timm that takes images; pass "
            "module=…, the path of the module whose output is the patch tokens."
        )
    if len(found) > 1:
        names = ", ".join(f"{path!r} ({type(tower).__name__})" for path, tower in found.items())
        raise BackboneError(f"{type(model).__name__} holds several vision backbones: choose module= from {names}.")
    path = next(iter(found))
    if not isinstance(found[path], PreTrainedModel) and set(head.projections) != {-1}:
        raise BackboneError(
            f"{path} of {type(model).__name__} makes the last tokens, but the head is for layers "
            f"{list(head.projections)}; pass module=…, the path of the module that makes those."
        )
    return path


def _module_sites(model: nn.Module, head: GivenHead, inputs: Inputs | None) -> tuple[str, list[Site], Host] | None:
    """Where the tokens of a head of a module of another library are made in such a module, or in a part that is one.

    `None` if the head is of a transformers model, or there is no such module.
    """
    plain: Any = head.config and head.config.plain_backbone
    found = [path for path, part in model.named_modules() if plain and architecture_of(part) == plain["architecture"]]
    if not found or head.config is None:
        return None
    if plain["tokens"] is None:
        raise BackboneError(
            "The tokens of this head were made by a function, so where the model makes them is not known; pass "
            "module=…, the path of the module whose output they are."
        )
    size = image_size_of(inputs) or fitted_size(head.config)
    opened = OpenedBackbone(model.get_submodule(found[0]), tokens=plain["tokens"], size=size)
    check_sizes(plain, opened.model)
    warn_of_other_weights(opened.model, weight_digests(opened.model), head.config.backbone_digests)
    size = size or probe_size(opened.model)
    inside, layout = module_that_makes(opened.model, head.layouts[-1], size)
    path = ".".join(part for part in (found[0], inside) if part)
    return path, [head.site(model.get_submodule(path), -1, -1, layout)], Host(model, size, inputs)


def _check_tower(model: nn.Module, tower: PreTrainedModel, head: GivenHead) -> None:
    """Refuses a backbone of another architecture than the head's, and says so if it has other weights."""
    plain: Any = head.config and head.config.plain_backbone
    if head.config is not None and plain:  # the same weights in another order have other digests
        check_sizes(plain, tower)
        warn_if_other_tokens(head.config, type(tower).__name__)
    elif head.config is not None:
        check_same_architecture(head.config.backbone, tower.config)
        warn_of_other_weights(tower, weight_digests(tower), head.config.backbone_digests)
    hooked = any(getattr(part, "_output_capturing_hooks_installed", False) for part in model.modules())
    if isinstance(model, PreTrainedModel) and not hooked:  # from the top, or the model's own first call doubles them
        maybe_install_capturing_hooks(model)


def _tower_sites(
    path: str,
    tower: PreTrainedModel,
    head: GivenHead,
    size: tuple[int, int],
    find: Callable[[Probe, int], PatchLayout],
) -> list[Site]:
    source = states_source(tower, size)
    offered = [one for one in head.projections if one >= 0 or source is tower]
    if not offered:
        raise BackboneError(
            f"{type(tower).__name__} hands on feature maps of its hidden states, never last_hidden_state: fit a head "
            f"on those, with layer={list(tower.out_indices)}."
        )
    known = {} if head.config and head.config.plain_backbone else head.layouts
    probe = Probe(tower, size, any(layer >= 0 for layer in offered), spots=not set(offered) <= set(known))
    sites = []
    for layer in offered:
        layout = known.get(layer) or find(probe, layer)
        where = f"layer {layer} of {path or type(tower).__name__}"
        _check_tokens(probe.tokens(layer), layout, size, head.projections[layer], where)
        sites.append(head.site(source, layer, layer, layout))
    return sites


def _plain_site(host: Host, path: str, module: nn.Module, head: GivenHead) -> Site:
    if len(head.projections) > 1:
        raise HeadError(f"The head has layers {list(head.projections)}; choose the one of {path} with layer=….")
    ((layer, projection),) = head.projections.items()
    if layer not in head.layouts:
        raise LayoutError(
            f"A projection alone does not say which tokens of {path} are patches: pass layout=PatchLayout(prefix=…)."
        )
    seen: list[Tensor] = []
    host.run({module: lambda _, __, outputs: note_tokens(outputs, -1, seen)})
    if not seen:
        raise BackboneError(f"{path} is not called when {type(host.model).__name__} runs; choose another module.")
    if seen[0].ndim not in (3, 4):
        raise BackboneError(f"{path} gives a tensor of shape {tuple(seen[0].shape)}, which holds no patch tokens.")
    layout = head.layouts[layer]
    _check_tokens(seen[0], layout, host.size if layout.stride else None, projection, path)
    return head.site(module, layer, -1, layout)


def _check_tokens(
    tokens: Tensor, layout: PatchLayout, size: tuple[int, int] | None, projection: SOAPProjection, where: str
) -> None:
    """Refuses tokens that do not lie as `layout` says, or are not of the projection's width."""
    try:
        if size is not None:
            layout.patches(tokens, size)
        layout.map_patches(tokens, lambda patches: patches)
    except LayoutError as error:
        raise LayoutError(f"The tokens of {where} do not lie as the head expects: {error}") from error
    width = tokens.shape[1 if layout.order == "channels_first" else -1]
    if width != projection.dim:
        raise HeadError(
            f"The head is for tokens of width {projection.dim}, but those of {where} have width {width}; fit a head "
            "for this backbone and layer."
        )


def note_tokens(outputs: Any, place: int, seen: list[Tensor]) -> Any:
    def note(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return tokens

    return map_tokens(outputs, place, note)


def layers_given(host: Host, site: Site) -> list[int]:
    """The hidden states that a module hands on when the model runs."""
    given: list[int] = []

    def note(_: nn.Module, __: Any, outputs: Any) -> None:
        states = getattr(outputs, "hidden_states", None) or ()
        given.extend(layer for layer, state in enumerate(states) if state is not None)

    host.run({site.module: note})
    return given


def is_read(host: Host, site: Site) -> bool:
    """Whether anything that the model computes changes when its patch tokens do."""
    seen: list[Tensor] = []

    def disturb(module: nn.Module, arguments: Any, outputs: Any) -> Any:
        note_tokens(outputs, site.place, seen)  # hidden_states may hand them on as they were
        return note_tokens(map_tokens(outputs, site.place, site.disturb), site.place, seen)

    before = host.run({site.module: lambda _, __, outputs: note_tokens(outputs, site.place, seen)})
    return bool(seen) and depends(before, host.run({site.module: disturb}), seen)
