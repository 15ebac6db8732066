"""Finding where a module of any library has its patch tokens: by the conventions of libraries, and by a probe."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import BackboneError, SOAPError, first_sentence
from .detection import PatchLayout
from .evidence import FEW_EXTRA_TOKENS
from .plain import PlainBackbone, Tokens, TokenSource, is_token_shaped, listed, parts_of, run, seen_of
from .probing import CALL_ERRORS, Probe, evaluation_mode, probe_size

PREFERRED = ("x_norm_patchtokens", "last_hidden_state")
"""What libraries call the patch tokens in a dict."""


def open_plain(
    module: nn.Module, tokens: str | TokenSource | Callable[[Tensor], Any] | None = None, size: Any = None
) -> PlainBackbone:
    """A module of any library as a backbone; it is left as it was.

    Args:
        module (`nn.Module`): takes pixels `(B, C, H, W)`.
        tokens (`str` or callable, *optional*): where its patch tokens are, as [`TokenSource`] reads it, or a function
            of pixels; found if not given: what `forward_features` or the module returns, or torchvision's encoder.
        size (`(height, width)`, *optional*): to look at the module; default: native or 224 x 224.

    Raises:
        BackboneError: the module takes no pixels, or gives no patch tokens, or several tensors that could be them.

    Example:
        >>> class ViT(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = nn.Conv2d(3, 8, 8, stride=8)
        ...     def forward_features(self, pixels):
        ...         return {"cls": pixels.mean((2, 3)), "patches": self.embed(pixels).flatten(2).mT}
        >>> str(open_plain(ViT()).tokens)
        'forward_features:patches'
    """
    if next(module.parameters(), None) is None:
        raise BackboneError(f"{type(module).__name__} has no weights, so it is no backbone; give the whole model.")
    known: Tokens | None = TokenSource.parse(tokens) if isinstance(tokens, str) else tokens
    if known is not None and not callable(known) and not isinstance(known, TokenSource):
        raise BackboneError(f"tokens is the path of a module or a function of pixels, not {type(tokens).__name__}.")
    backbone = PlainBackbone(module, known or TokenSource())
    if known is None:
        backbone.tokens = _found(backbone, size or probe_size(backbone))
    elif isinstance(known, TokenSource) and known.key is None:
        backbone.tokens = _with_key(backbone, known, size or probe_size(backbone))
    return backbone


def _found(backbone: PlainBackbone, size: tuple[int, int]) -> TokenSource:
    """The source that conventions and a probe tell."""
    module, name = backbone.module, type(backbone.module).__name__
    pooled = []
    for path in _conventions(module):
        output = _output(backbone, path, size)
        parts = parts_of(output)
        if is_token_shaped(output):
            return TokenSource(path)
        shaped = {key: part for key, part in parts.items() if is_token_shaped(part)}
        if shaped:
            return TokenSource(path, _chosen(backbone, path, shaped, size))
        shapes = [str(tuple(part.shape)) for part in parts.values() or (output,) if isinstance(part, Tensor)]
        pooled.append(f"{path or 'forward'} gives {', '.join(shapes) or type(output).__name__}")
    example = _last_of_tokens(backbone, size)
    hint = f", e.g. {example!r}" if example else ""
    raise BackboneError(
        f"{name} returns no patch tokens ({'; '.join(pooled)}): SOAP needs a token for each patch, not pooled "
        f"features; pass tokens=…, the path of the module that makes them{hint}, or a function of pixels."
    )


def _with_key(backbone: PlainBackbone, source: TokenSource, size: tuple[int, int]) -> TokenSource:
    """A source with the key that was left open, if its output has parts."""
    parts = parts_of(_output(backbone, source.path, size))
    shaped = {key: part for key, part in parts.items() if is_token_shaped(part)}
    return TokenSource(source.path, _chosen(backbone, source.path, shaped, size)) if shaped else source


def _conventions(module: nn.Module) -> Iterator[str]:
    """Where libraries have their tokens, the most telling first."""
    features: Any = getattr(module, "forward_features", None)
    if callable(features) and _takes_pixels_alone(features):
        yield "forward_features"
    if hasattr(module, "_process_input") and isinstance(getattr(module, "encoder", None), nn.Module):
        yield "encoder"  # torchvision
    yield ""


def _takes_pixels_alone(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None)
    except TypeError:  # CAPI's has more
        return False
    return True


def _chosen(backbone: PlainBackbone, path: str, shaped: dict[str, Tensor], size: tuple[int, int]) -> str:
    """The part that is the patch tokens: by its name, as the only one, or as the only one that a probe confirms."""
    named = [key for key in PREFERRED if key in shaped]
    whole = [key for key, part in shaped.items() if _holds_grid(part, size, backbone.config.patch_size)]
    for few in (named, whole, list(shaped)):
        if len(few) == 1:
            return few[0]
    confirmed = []
    for key in shaped:
        with suppress(SOAPError):
            trial = PlainBackbone(backbone.module, TokenSource(path, key))
            PatchLayout.from_probe(Probe(trial, size))
            confirmed.append(key)
    if len(confirmed) != 1:
        raise BackboneError(
            f"{path or 'The output'} of {type(backbone.module).__name__} holds several tensors that could be its "
            f"patch tokens: choose {listed(path, shaped)}."
        )
    return confirmed[0]


def _holds_grid(part: Tensor, size: tuple[int, int], patch: int | None) -> bool:
    """Whether a tensor has a token for each patch of an image, and few others."""
    if patch is None:
        return True
    grid = size[0] // patch, size[1] // patch
    if part.ndim == 4:
        return grid in (tuple(part.shape[1:3]), tuple(part.shape[2:]))
    return 0 <= part.shape[1] - grid[0] * grid[1] <= FEW_EXTRA_TOKENS


@torch.no_grad()
def _output(backbone: PlainBackbone, path: str, size: tuple[int, int]) -> Any:
    """What the module returns at a path for noise."""
    module, parameter = backbone.module, next(backbone.parameters())
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, backbone.config.num_channels or 3, *size, generator=generator)
    with evaluation_mode(module):
        try:
            return run(module, path, pixels.to(parameter.device, parameter.dtype))
        except BackboneError:
            raise
        except CALL_ERRORS as error:
            raise BackboneError(
                f"{type(module).__name__} cannot be called with images of {size[0]} x {size[1]} pixels alone "
                f"({first_sentence(error)}); pass tokens=…, a function of pixels, or another image_size."
            ) from error


def _last_of_tokens(backbone: PlainBackbone, size: tuple[int, int]) -> str | None:
    """The path of the last module that gives tokens while the backbone runs."""
    return next(reversed(outputs_of_modules(backbone, lambda: _output(backbone, "", size))), None)


def outputs_of_modules(backbone: PlainBackbone, call: Callable[[], Any]) -> dict[str, Tensor]:
    """What the modules inside a backbone return that may be tokens, by path, in the order in which they end."""
    seen: dict[str, Tensor] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if is_token_shaped(first):
                seen.pop(path, None)  # the last call counts
                seen[path] = first

        return hook

    hooks = [part.register_forward_hook(note(path)) for path, part in backbone.module.named_modules() if path]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def module_that_makes(backbone: PlainBackbone, layout: PatchLayout, size: tuple[int, int]) -> tuple[str, PatchLayout]:
    """The path of the last module inside a backbone whose output holds its patch tokens, and how they lie there.

    `layout` is how they lie in the backbone's tokens, and `size` is `(height, width)` of the image to look at.

    Raises:
        BackboneError: there is none.
    """
    probes: list[Probe] = []
    outputs = outputs_of_modules(backbone, lambda: probes.append(Probe(backbone, size, spots=False)))
    patches = layout.patches(probes[0].tokens(-1), size)
    for path, output in reversed(outputs.items()):
        if (found := _layout_of(patches, output, size)) is not None:
            return path, found
    raise BackboneError(
        f"No module inside {type(backbone.module).__name__} makes the tokens at {str(backbone.tokens)!r}; pass "
        "module=…, the path of one whose output holds them."
    )


def _layout_of(patches: Tensor, output: Tensor, size: tuple[int, int]) -> PatchLayout | None:
    """How patch tokens `(B, *grid, D)` lie in what a module returns; `None` if they do not."""
    if output.ndim == 4:
        maps = {"channels_first": output.permute(0, 2, 3, 1), "channels_last": output}
        orders = (
            order for order, found in maps.items() if found.shape == patches.shape and torch.equal(found, patches)
        )
        order: Any = next(orders, None)
        return PatchLayout(order=order) if order else None
    row = patches.flatten(1, 2)
    extra = output.shape[1] - row.shape[1]
    if len(output) != len(row) or output.shape[-1] != row.shape[-1]:
        return None
    for prefix in range(extra + 1):
        if torch.equal(output[:, prefix : prefix + row.shape[1]], row):
            return PatchLayout(prefix=prefix, suffix=extra - prefix, stride=size[0] // patches.shape[1])
    return None


def described(backbone: PlainBackbone) -> dict[str, Any]:
    """What a head keeps of a module, to know it again."""
    return {
        "architecture": backbone.architecture,
        "num_parameters": sum(parameter.numel() for parameter in backbone.module.parameters()),
        **seen_of(backbone.module),
        "tokens": str(backbone.tokens) if isinstance(backbone.tokens, TokenSource) else None,
    }
