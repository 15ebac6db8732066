"""A module of any library as a backbone: called on pixels, with its patch tokens taken from where they are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from ..runtime.errors import BackboneError


@dataclass(frozen=True)
class TokenSource:
    """Where in a module its patch tokens are: `"blocks.11"`, `"forward_features:x_norm_patchtokens"`, `":2"`.

    Attributes:
        path (`str`): a module whose output they are, or a method that makes them of pixels; empty for the module's own
            output.
        key (`str`, *optional*): where in an output that is a dict or a tuple: its key or its number.

    Example:
        >>> TokenSource.parse("forward_features:x_norm_patchtokens").key
        'x_norm_patchtokens'
    """

    path: str = ""
    key: str | None = None

    @classmethod
    def parse(cls, text: str) -> "TokenSource":
        """Reads what `str` writes."""
        path, _, key = text.partition(":")
        return cls(path, key or None)

    def __str__(self) -> str:
        return self.path if self.key is None else f"{self.path}:{self.key}"


Tokens = TokenSource | Callable[[Tensor], Any]
"""Where they are, or what makes them of pixels `(B, C, H, W)`."""


class PlainConfig(PretrainedConfig):
    """What can be seen of a module: its size, as the config of a transformers model would tell it."""

    model_type = "plain_module"

    image_size: list[int] | None = None
    patch_size: int | None = None
    num_channels: int | None = None
    num_hidden_layers: int | None = None


class PlainBackbone(PreTrainedModel):
    """A module that is no transformers model, with the interface of one: `last_hidden_state` are its tokens.

    The module is shared and left as it is: hooks are there only while it runs.

    Args:
        module (`nn.Module`): takes pixels `(B, C, H, W)`.
        tokens ([`TokenSource`] or callable): where its tokens are, `(B, N, D)`, `(B, D, H, W)` or `(B, H, W, D)`.

    Example:
        >>> import torch
        >>> patchify = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2))
        >>> backbone = PlainBackbone(patchify, lambda pixels: patchify(pixels).mT)
        >>> backbone(torch.zeros(2, 3, 16, 16)).last_hidden_state.shape, backbone.config.patch_size
        (torch.Size([2, 16, 8]), 4)
    """

    config_class = PlainConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = True  # the module chooses by itself
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, module: nn.Module, tokens: Tokens):
        super().__init__(PlainConfig(**seen_of(module)))
        self.module, self.tokens = module, tokens
        self.name_or_path = architecture_of(module)  # what errors call it
        self.post_init()
        self.training = module.training

    def init_weights(self) -> None:
        """Does nothing: the module comes with its weights."""

    @property
    def architecture(self) -> str:
        """The module's class, with the package it comes from."""
        return architecture_of(self.module)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Runs the module on pixels; `kwargs` are the module's own, and the other arguments change nothing.

        Raises:
            BackboneError: the tokens are not where they should be, or none for each image.
        """
        tokens = self.tokens
        if isinstance(tokens, TokenSource):
            found = take(run(self.module, tokens.path, pixel_values, **kwargs), tokens)
        else:
            found = tokens(pixel_values)
        return BaseModelOutput(last_hidden_state=self._checked(found, len(pixel_values)))

    def _checked(self, found: Any, num_images: int) -> Any:
        where = (str(self.tokens) or "The output") if isinstance(self.tokens, TokenSource) else "The tokens' function"
        name = type(self.module).__name__
        if not isinstance(found, Tensor) or found.ndim not in (3, 4):
            what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise BackboneError(
                f"{where} of {name} is {what}, which holds no patch tokens: SOAP needs a token for each "
                "patch, (B, N, D) or a map, not pooled features; pass tokens=…, the path of what makes them."
            )
        if len(found) != num_images:
            raise BackboneError(
                f"{where} of {name} has {len(found)} rows for {num_images} images; tokens must be "
                "(B, N, D) or a map, with one row for each image."
            )
        return found


def architecture_of(module: nn.Module) -> str:
    """A module's class, with the package it comes from."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def name_of(model: nn.Module) -> str:
    """The class of a model, of a plain module its own, for an error to name."""
    return type(model.module if isinstance(model, PlainBackbone) else model).__name__


def run(module: nn.Module, path: str, pixels: Tensor, **kwargs: Any) -> Any:
    """What a module returns for pixels at a path: of itself, of a method, or of a module inside while it runs.

    Raises:
        BackboneError: there is nothing at the path, or it is not called.
    """
    if not path:
        return module(pixels, **kwargs)
    name = type(module).__name__
    target: Any = module
    for part in path.split("."):
        target = getattr(target, part, None)
    if not isinstance(target, nn.Module):
        if not callable(target):
            raise BackboneError(f"{name} has no module or method {path!r}; {name}.named_modules() lists its modules.")
        return target(pixels, **kwargs)
    seen: list[Any] = []
    hook = target.register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        module(pixels, **kwargs)
    finally:
        hook.remove()
    if not seen:
        raise BackboneError(f"{path!r} is not called when {name} runs on pixels; choose another module for tokens.")
    return seen[-1]


def take(output: Any, source: TokenSource) -> Any:
    """The tensor that a source means inside an output.

    Raises:
        BackboneError: there is no such part, or several could be meant.
    """
    parts = parts_of(output)
    if source.key is not None:
        if source.key not in parts:
            known = ", ".join(parts) or "none: it is a tensor"
            raise BackboneError(f"The output at {source.path!r} has no part {source.key!r}; its parts are {known}.")
        return parts[source.key]
    if not parts:
        return output
    shaped = {key: part for key, part in parts.items() if is_token_shaped(part)}
    if len(shaped) != 1:
        shown = f"several tensors: choose one of {listed(source.path, shaped)}" if shaped else "no patch tokens"
        raise BackboneError(f"The output at {source.path!r} holds {shown}.")
    return next(iter(shaped.values()))


def parts_of(output: Any) -> dict[str, Any]:
    """The parts of a dict, tuple or list by key or number; none of a tensor."""
    if isinstance(output, Mapping):
        return {str(key): part for key, part in output.items()}
    if isinstance(output, (tuple, list)):
        return {str(number): part for number, part in enumerate(output)}
    return {}


def is_token_shaped(part: Any) -> bool:
    """Whether this may be patch tokens: a tensor of numbers `(B, N, D)` or a map."""
    return isinstance(part, Tensor) and part.is_floating_point() and part.ndim in (3, 4)


def listed(path: str, parts: Mapping[str, Tensor]) -> str:
    """Sources that one can choose from, as one would write them."""
    return ", ".join(f"tokens={str(TokenSource(path, key))!r} {tuple(part.shape)}" for key, part in parts.items())


def seen_of(module: nn.Module) -> dict[str, Any]:
    """What a module's attributes, its first convolution and its longest row of like blocks say of it."""
    places = [module, *(part for part in (getattr(module, "patch_embed", None),) if part is not None)]
    convolutions = (part for part in module.modules() if isinstance(part, nn.Conv2d))
    first = next(convolutions, None)
    patch = _pair(places, "patch_size")
    if patch is None and first is not None and first.kernel_size == first.stride:
        patch = int(first.kernel_size[0]), int(first.kernel_size[1])
    sides = _pair(places, "img_size") or _pair(places, "image_size") or _size_of_timm(module)
    depths = [len(part._modules) for part in module.modules() if _is_row_of_blocks(part)]
    return {
        "image_size": sides and list(sides),
        "patch_size": patch[0] if patch and patch[0] == patch[1] else None,
        "num_channels": None if first is None else first.in_channels,
        "num_hidden_layers": max(depths, default=None),
    }


def _pair(places: list[Any], name: str) -> tuple[int, int] | None:
    """The first pair of whole numbers by a name, or one that stands for both."""
    for place in places:
        value = getattr(place, name, None)
        pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
        if len(pair) == 2 and all(type(side) is int and side > 0 for side in pair):
            return pair[0], pair[1]
    return None


def _size_of_timm(module: nn.Module) -> tuple[int, int] | None:
    known = getattr(module, "pretrained_cfg", None)
    size = known.get("input_size") if isinstance(known, Mapping) else None
    return (int(size[-2]), int(size[-1])) if isinstance(size, (tuple, list)) and len(size) == 3 else None


def _is_row_of_blocks(part: nn.Module) -> bool:
    """Whether this holds modules of one class that hold weights in parts of their own, as transformer blocks do."""
    if not isinstance(part, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
        return False
    blocks = list(part.children())
    return len({type(block) for block in blocks}) == 1 and all(any(True for _ in block.children()) for block in blocks)
