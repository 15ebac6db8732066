"""Where the patch tokens lie in a backbone's output."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .backbones import CallConvention, evaluation_mode, first_sentence, native_image_size, unmasked
from .errors import BackboneError, HeadError, LayoutError

Order = Literal["tokens", "channels_first", "channels_last"]
ORDERS: tuple[Order, ...] = ("tokens", "channels_first", "channels_last")

_PREFIX_PARAMETERS = {"cls_token", "distillation_token", "register_tokens", "class_embedding"}
_SUFFIX_PARAMETERS = {"detection_tokens"}
_NOT_IN_SEQUENCE = ("head.", "pooler.", "decoder.")


@dataclass(frozen=True)
class PatchLayout:
    """Where the patch tokens lie in the tensor that a backbone returns.

    Attributes:
        order (`str`, defaults to `"tokens"`): `"tokens"` for (B, N, D), `"channels_first"` for (B, D, H, W),
            `"channels_last"` for (B, H, W, D).
        prefix (`int`, defaults to 0): tokens before the patches (CLS, registers).
        suffix (`int`, defaults to 0): tokens after them (detection tokens).
        stride (`int`, *optional*): pixels from one patch to the next; needed to lay (B, N, D) tokens out on their
            grid.

    Example:
        >>> import torch
        >>> layout = PatchLayout(prefix=1, stride=16)
        >>> layout.patches(torch.zeros(2, 1 + 14 * 28, 8), image_size=(224, 448)).shape
        torch.Size([2, 14, 28, 8])
    """

    order: Order = "tokens"
    prefix: int = 0
    suffix: int = 0
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise LayoutError(f"order must be one of {', '.join(ORDERS)}, not {self.order!r}.")
        counts = {"prefix": self.prefix, "suffix": self.suffix, "stride": 1 if self.stride is None else self.stride}
        for name, value in counts.items():
            if not isinstance(value, int) or value < (name == "stride"):
                raise LayoutError(
                    f"{name} of a patch layout must be a whole number of tokens or pixels, not {value!r}."
                )

    @classmethod
    def detect(
        cls,
        model: PreTrainedModel,
        *,
        image_size: int | tuple[int, int] | None = None,
        layer: int = -1,
        **overrides: Any,
    ) -> "PatchLayout":
        """Finds the layout from the model's parameters and one forward pass of one empty image.

        Args:
            model (`PreTrainedModel`): a vision backbone; it is left as it was.
            image_size (`int` or `(height, width)`, *optional*): defaults to the size in the model's config, else 224.
            layer (`int`, defaults to -1): which tensor: -1 is `last_hidden_state`, `i >= 0` is `hidden_states[i]`.
            overrides: any field of the layout, taken as given instead of found.

        Raises:
            BackboneError: the model cannot take the image size, or returns no patch tokens.
            LayoutError: the token count does not fit a grid; the message says how to override.

        Example:
            >>> from transformers import ViTConfig, ViTModel
            >>> config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            ...                    image_size=32, patch_size=8)
            >>> PatchLayout.detect(ViTModel(config))
            PatchLayout(order='tokens', prefix=1, suffix=0, stride=8)
        """
        size = as_size(image_size) or probe_size(model)
        return cls.from_tokens(probe(model, size, layer), model, size, **overrides)

    @classmethod
    def from_tokens(
        cls, tokens: Tensor, model: PreTrainedModel, image_size: tuple[int, int], **overrides: Any
    ) -> "PatchLayout":
        """Finds the layout from what the model returned for images of one size; see `detect`."""
        unknown = set(overrides) - {field.name for field in fields(cls)}
        if unknown:
            raise LayoutError(f"A patch layout has no field {', '.join(sorted(unknown))}.")
        prefix, suffix = _extra_tokens(model) if tokens.ndim == 3 else (0, 0)
        found: dict[str, Any] = {"order": _order(tokens, model), "prefix": prefix, "suffix": suffix} | overrides
        if found["order"] == "tokens" and found.get("stride") is None:
            num_patches = tokens.shape[1] - found["prefix"] - found["suffix"]
            found["stride"] = _stride(num_patches, image_size, model.config)
            if found["stride"] is None:
                raise LayoutError(
                    f"{type(model).__name__} returns {tokens.shape[1]} tokens for an image of {image_size[0]} x "
                    f"{image_size[1]} pixels; without {found['prefix']} before and {found['suffix']} after them, "
                    f"{num_patches} patches form no grid: pass a PatchLayout(prefix=…, suffix=…, stride=…)."
                )
        return cls(**found)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PatchLayout":
        """Reads the layout of a head's config.

        Raises:
            HeadError: unknown fields or impossible values.
        """
        try:
            return cls(**values)
        except (TypeError, LayoutError) as error:
            raise HeadError(f"The head's config holds a patch layout that is not one ({error}).") from error

    def to_dict(self) -> dict[str, Any]:
        """The fields, for a head's config."""
        return asdict(self)

    def grid(self, image_size: int | tuple[int, int] | None, num_patches: int) -> tuple[int, int]:
        """Rows and columns of `num_patches` patches of an image; partial patches are dropped or padded.

        Raises:
            LayoutError: neither gives `num_patches`, or the stride is not known.
        """
        size = as_size(image_size)
        if self.stride is None or size is None:
            raise LayoutError(
                "The grid of (B, N, D) tokens needs a stride and an image size; pass PatchLayout(stride=…)."
            )
        grid = _grid(num_patches, size, self.stride)
        if grid is None:
            raise LayoutError(
                f"{num_patches} patches are no grid of stride {self.stride} over {size[0]} x {size[1]} pixels; check "
                f"the image size, or override the layout (now {self})."
            )
        return grid

    def patches(self, tokens: Tensor, image_size: int | tuple[int, int] | None = None) -> Tensor:
        """The patch tokens on their grid.

        Args:
            tokens (`torch.Tensor`): what the backbone returned, in this layout's order.
            image_size (`int` or `(height, width)`): of the pixels that went in; maps do not need it.

        Returns:
            `torch.Tensor` of shape `(B, *grid, D)`, a view where possible.

        Raises:
            LayoutError: the tokens do not lie as this layout says.
        """
        self._check_rank(tokens)
        if self.order == "channels_first":
            return tokens.permute(0, 2, 3, 1)
        if self.order == "channels_last":
            return tokens
        patches = tokens[:, self.prefix : tokens.shape[1] - self.suffix]
        return patches.unflatten(1, self.grid(image_size, patches.shape[1]))

    def map_patches(self, tokens: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Applies `function` (on `(..., D)`) to the patch tokens; prefix and suffix pass through untouched.

        Raises:
            LayoutError: the tokens do not lie as this layout says.
        """
        self._check_rank(tokens)
        if self.order == "channels_first":
            return function(tokens.movedim(1, -1)).movedim(-1, 1)
        if self.order == "channels_last" or self.prefix == self.suffix == 0:
            return function(tokens)
        end = tokens.shape[1] - self.suffix
        clean = function(tokens[:, self.prefix : end])
        return torch.cat((tokens[:, : self.prefix], clean, tokens[:, end:]), dim=1)

    def _check_rank(self, tokens: Tensor) -> None:
        if tokens.ndim != (3 if self.order == "tokens" else 4):
            raise LayoutError(f"{self} does not fit a tensor of shape {tuple(tokens.shape)}; override the layout.")
        if self.order == "tokens" and tokens.shape[1] <= self.prefix + self.suffix:
            raise LayoutError(
                f"{self} leaves no patch in a tensor of shape {tuple(tokens.shape)}; override the layout."
            )


def as_size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """`(height, width)` from an int or a pair; `None` stays `None`."""
    if image_size is None:
        return None
    return (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))


def layer_tokens(outputs: Any, layer: int) -> Tensor:
    """The tensor that a head belongs to: `last_hidden_state` for -1, `hidden_states[layer]` otherwise.

    Raises:
        BackboneError: the backbone does not return it.
    """
    if layer == -1:
        tokens = getattr(outputs, "last_hidden_state", None)
        if tokens is None:
            raise BackboneError(
                f"{type(outputs).__name__} has no last_hidden_state: the backbone returns no patch tokens."
            )
        return tokens
    states = getattr(outputs, "hidden_states", None)
    if not states:
        raise BackboneError(
            f"The backbone returns no hidden states, so layer={layer} cannot be cleaned; use layer=-1."
        )
    if layer >= len(states):
        raise BackboneError(f"layer={layer} does not exist: the backbone has hidden states 0 to {len(states) - 1}.")
    return states[layer]


def probe_size(model: PreTrainedModel) -> tuple[int, int]:
    """The size at which to look at a model: its native one, else 224 x 224."""
    return native_image_size(model.config) or (224, 224)


@torch.no_grad()
def probe(model: PreTrainedModel, size: tuple[int, int], layer: int = -1) -> Tensor:
    """What the backbone returns for one empty image of `size` pixels: `(1, N, D)`, or a map.

    Raises:
        BackboneError: it cannot take the size, or returns pooled features only.
    """
    parameter = next(model.parameters())
    channels = getattr(model.config, "num_channels", 3)
    pixels = torch.zeros(1, channels, *size, device=parameter.device, dtype=parameter.dtype)
    backbone = unmasked(model)
    kwargs = CallConvention.of(backbone).complete(pixels, {"output_hidden_states": True} if layer >= 0 else {})
    with evaluation_mode(backbone):
        try:
            outputs = backbone(pixels, **kwargs)
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            raise BackboneError(
                f"{type(model).__name__} cannot take images of {size[0]} x {size[1]} pixels "
                f"({first_sentence(error)}); "
                "choose another image_size."
            ) from error
    tokens = layer_tokens(outputs, layer)
    if tokens.ndim not in (3, 4):
        raise BackboneError(
            f"{type(model).__name__} returns a tensor of shape {tuple(tokens.shape)}, which holds no patch tokens: "
            "SOAP needs a backbone with a token for each patch, not pooled features."
        )
    return tokens


def _order(tokens: Tensor, model: PreTrainedModel) -> Order:
    if tokens.ndim == 3:
        return "tokens"
    timm_format = getattr(getattr(model, "timm_model", None), "output_fmt", None)
    channels_last = model.config.model_type.startswith("sam2") or str(timm_format).endswith("NHWC")
    return "channels_last" if channels_last else "channels_first"


def _extra_tokens(model: PreTrainedModel) -> tuple[int, int]:
    """Tokens before and after the patches, from what the model says about itself."""
    timm_prefix = getattr(getattr(model, "timm_model", None), "num_prefix_tokens", None)
    if timm_prefix is not None:
        return int(timm_prefix), 0
    if model.config.model_type == "radio":
        return int(model.config.num_summary_tokens), 0
    if model.config.model_type == "dinov3_convnext":
        return 1, 0  # a mean-pooled token comes first
    return _token_count(model, _PREFIX_PARAMETERS), _token_count(model, _SUFFIX_PARAMETERS)


def _token_count(model: nn.Module, leaves: set[str]) -> int:
    found = (
        parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in leaves and not any(f".{part}" in f".{name}" for part in _NOT_IN_SEQUENCE)
    )
    return sum(parameter.shape[-2] if parameter.ndim > 1 else 1 for parameter in found)


def _stride(num_patches: int, size: tuple[int, int], config: Any) -> int | None:
    """The stride that gives `num_patches`: the config's patch size first, then one that divides the image."""
    candidates = [stride for stride in range(1, max(size) + 1) if _grid(num_patches, size, stride)]
    said = set(_whole_numbers(getattr(config, "patch_size", None)))
    return min(candidates, key=lambda stride: (stride not in said, size[0] % stride + size[1] % stride), default=None)


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _whole_numbers(part)


def _grid(num_patches: int, size: tuple[int, int], stride: int) -> tuple[int, int] | None:
    floor = size[0] // stride, size[1] // stride
    ceil = math.ceil(size[0] / stride), math.ceil(size[1] / stride)
    return next((grid for grid in (floor, ceil) if grid[0] * grid[1] == num_patches and num_patches > 0), None)
