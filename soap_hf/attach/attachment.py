"""A head on any live model: the tokens come out clean where the model reads them, until the head is detached."""

import os
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch._dynamo import OptimizedModule
from transformers.utils import logging

from ..heads.model import SOAPModelWrapper
from ..layout.detection import PatchLayout
from ..runtime.errors import HeadError
from ..runtime.projection import SOAPProjection
from .hosts import Host, Inputs
from .sites import GivenHead, Site, find_sites, is_read, layers_given

logger = logging.get_logger(__name__)


def attach_soap(
    model: nn.Module,
    head: str | os.PathLike | SOAPModelWrapper | SOAPProjection,
    module: str = "auto",
    *,
    layer: int | None = None,
    layout: PatchLayout | None = None,
    inputs: Inputs | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> "SOAPAttachment":
    """Cleans the patch tokens inside a live model, where the model reads them.

    The tensor is the one the head was fitted on: with layer -1 the `last_hidden_state` that the vision backbone hands
    to the rest of the model, with layer `i` the `hidden_states[i]` that the rest of the model is given, or that the
    backbone makes its feature maps of. What the backbone computes inside itself stays as it was: later blocks, and its
    pooled output. Name the module that makes the tokens, e.g. `module="vision_model.post_layernorm"`, and everything
    that reads them, a pooling head inside the backbone too, gets them clean.

    Nothing of the model is copied or changed; forward hooks do the work. A warning says if nothing in the model
    depends on the tokens (a classifier that reads CLS alone). A copy of the model has the head as well, saved weights
    have not. Of a model compiled already, attach to what `torch.compile` returned: it is compiled again.

    Args:
        model (`nn.Module`): a task model, a model of images and text, a timm model, any module.
        head (`str`, [`SOAPModelWrapper`] or [`SOAPProjection`]): folder, hub id, live head or projection alone.
        module (`str`, defaults to `"auto"`): path of the vision backbone in the model, or of any module whose output
            is the token tensor (or a tuple that starts with it). Default: the only vision backbone there is.
        layer (`int`, *optional*): the layer of a bare projection (default: -1), or one of a head's several.
        layout ([`PatchLayout`], *optional*): where the patch tokens lie; default: what the head says, or what a probe
            of the backbone finds.
        inputs (`torch.Tensor` or `dict`, *optional*): what the model can be called with, for the check that the tokens
            pass; default: an image of noise of 8 x 8 patches, of native size where the model takes no other. One that
            has other arguments needs them; a small image costs less.
        revision, token: for a head on the Hub.

    Returns:
        [`SOAPAttachment`], a context manager with a method `detach`.

    Raises:
        BackboneError: no vision backbone, several of them, or no patch tokens where `module` points.
        HeadError: the head belongs to another backbone or width, or is attached already.
        LayoutError: the tokens do not lie as the head expects.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForMaskedImageModeling
        >>> model = ViTForMaskedImageModeling(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...     intermediate_size=8, image_size=32, patch_size=8, encoder_stride=8)).eval()
        >>> pixels, projection = torch.zeros(1, 3, 32, 32), SOAPProjection(torch.eye(8)[:, :1], torch.ones(1))
        >>> before = model(pixels).reconstruction
        >>> with attach_soap(model, projection):
        ...     bool((model(pixels).reconstruction == before).all())
        False
        >>> bool((model(pixels).reconstruction == before).all())
        True
    """
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    chosen = GivenHead.read(head, layer, layout, revision, token)
    path, sites, host = find_sites(bare, module, chosen, inputs)
    for site in sites:
        if any(isinstance(hook, Site) and hook.is_same(site) for hook in site.module._forward_hooks.values()):
            raise HeadError(f"This head is attached to {path or 'this model'} already; detach it first.")
    if path:  # else the model is the backbone, and its caller reads the tokens
        _check_reading(host, sites, chosen, path)
    if any(isinstance(part, OptimizedModule) or part._compiled_call_impl is not None for part in model.modules()):
        torch.compiler.reset()  # code compiled without a hook does not look for one
    return SOAPAttachment(sites, f"{type(bare).__name__}{f'.{path}' if path else ''}")


class SOAPAttachment:
    """A head on a live model, until `detach` or the end of a `with` block. Made by [`attach_soap`]."""

    def __init__(self, sites: list[Site], name: str):
        self._name, self._sites = name, sites
        self._hooks = [site.module.register_forward_hook(site) for site in sites]

    @property
    def projections(self) -> dict[int, SOAPProjection]:
        """What is removed, by layer."""
        return {site.layer: site.projection for site in self._sites}

    def detach(self) -> None:
        """Takes the head off; the model is as it was. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> "SOAPAttachment":
        return self

    def __exit__(self, *_: Any) -> None:
        self.detach()

    def __repr__(self) -> str:
        removed = ", ".join(f"{single.rank} of layer {layer}" for layer, single in self.projections.items())
        return f"SOAPAttachment({removed} {'on' if self._hooks else 'detached from'} {self._name})"


def detach_soap(model: nn.Module) -> None:
    """Takes every head off a model, also off a copy of one that had heads attached."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, Site):
                del module._forward_hooks[key]


def _check_reading(host: Host, sites: list[Site], head: GivenHead, path: str) -> None:
    """Warns of the layers that nothing in the model depends on."""
    unread = [layer for layer in head.projections if layer not in {site.layer for site in sites}]
    unread += [site.layer for site in sites if not is_read(host, site)]
    if not unread:
        return
    read = [layer for layer in layers_given(host, sites[0]) if is_read(host, replace(sites[0], place=layer))]
    advice = f"; what it reads is layer {', '.join(map(str, read))}" if read else ""
    logger.warning(
        f"Nothing that {type(host.model).__name__} computes depends on the patch tokens of layer "
        f"{', '.join(map(str, unread))} of {path}, so cleaning them changes no result{advice}."
    )
