"""Where the patch tokens lie in a backbone's output, and one vector for an image made of them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import BackboneError, HeadError, LayoutError, NonFiniteTokensError

Order = Literal["tokens", "frames_rows_columns", "rows_columns_frames", "packed", "channels_first", "channels_last"]
MAPS: tuple[Order, ...] = ("channels_first", "channels_last")
CLIPS: tuple[Order, ...] = ("frames_rows_columns", "rows_columns_frames")
ORDERS: tuple[Order, ...] = ("tokens", *CLIPS, "packed", *MAPS)

Pooling = Literal["mean", "cls", "cls+mean"]
POOLINGS: tuple[Pooling, ...] = ("mean", "cls", "cls+mean")


@dataclass(frozen=True)
class PatchLayout:
    """Where the patch tokens lie in the tensor that a backbone returns: their order, and how many others there are.

    The package's class of the same name says what each field means, and finds the layout of a backbone.
    """

    order: Order = "tokens"
    prefix: int = 0
    suffix: int = 0
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise LayoutError(f"order must be one of {', '.join(ORDERS)}, not {self.order!r}.")
        stride = 1 if self.stride is None else self.stride
        for name, value, least in (("prefix", self.prefix, 0), ("suffix", self.suffix, 0), ("stride", stride, 1)):
            if not isinstance(value, int) or value < least:
                raise LayoutError(f"{name} of a patch layout must be a whole number from {least} on, not {value!r}.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Any:
        """The layout that a head's config holds; a `HeadError` says what is impossible in it."""
        try:
            return cls(**values)
        except (TypeError, LayoutError) as error:
            raise HeadError(f"The head's config holds a patch layout that is not one ({error}).") from error

    def to_dict(self) -> dict[str, Any]:
        """The fields, for a head's config."""
        return asdict(self)

    def grid(self, image_size: int | tuple[int, int] | None, num_patches: int) -> tuple[int, ...]:
        """Rows and columns (frames, rows and columns of a clip) of `num_patches` patches of one image.

        Partial patches at the border are dropped or padded, whichever gives `num_patches`; a `LayoutError` if neither.
        """
        size = as_size(image_size)
        if self.stride is None or size is None:
            raise LayoutError(
                "A grid of (B, N, D) tokens needs a stride and an image size; pass PatchLayout(stride=…)."
            )
        if self.order in CLIPS:
            rows, columns = max(1, size[0] // self.stride), max(1, size[1] // self.stride)
            if num_patches % (rows * columns) == 0:
                return num_patches // (rows * columns), rows, columns
        elif grid := fit_grid(num_patches, size, self.stride):
            return grid
        raise LayoutError(
            f"{num_patches} patches are no grid of stride {self.stride} over {size[0]} x {size[1]} pixels; check "
            f"the image size, or override the layout (now {self})."
        )

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
        if self.order == "packed":  # the images of a batch, of one size, end to end
            size, stride = as_size(image_size) or (0, 0), self.stride or 1
            rows, columns = size[0] // stride, size[1] // stride
            if len(tokens) != 1 or rows * columns == 0 or tokens.shape[1] % (rows * columns):
                raise LayoutError(
                    f"Packed tokens of shape {tuple(tokens.shape)} are no grids of stride {stride} over {size[0]} x "
                    f"{size[1]} pixels: lay out images of one size at a time."
                )
            return tokens.view(-1, rows, columns, tokens.shape[-1])
        patches = tokens[:, self.prefix : tokens.shape[1] - self.suffix]
        grid = self.grid(image_size, patches.shape[1])
        if self.order == "rows_columns_frames":
            return patches.unflatten(1, (*grid[1:], grid[0])).movedim(3, 1)
        return patches.unflatten(1, grid)

    def map_patches(self, tokens: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Applies `function` (on `(..., D)`) to the patch tokens, and to no others; errors as in `patches`."""
        self._check_rank(tokens)
        if self.order == "channels_first":
            return function(tokens.movedim(1, -1)).movedim(-1, 1)
        if self.order in ("channels_last", "packed") or self.prefix == self.suffix == 0:
            return function(tokens)
        end = tokens.shape[1] - self.suffix
        clean = function(tokens[:, self.prefix : end])
        return torch.cat((tokens[:, : self.prefix], clean, tokens[:, end:]), dim=1)

    def pooled(self, tokens: Tensor, image_size: tuple[int, int], pooling: Pooling) -> Tensor:
        """One vector for each image, `(B, D)`, of tokens as in `patches`; a `LayoutError` if there can be none.

        `pooling` is `"mean"` over the patch tokens, `"cls"` for the first token before them, or `"cls+mean"` for both
        side by side, `(B, 2 * D)`.

        Example:
            >>> PatchLayout(prefix=1, stride=8).pooled(torch.zeros(2, 1 + 16, 4), (32, 32), "cls+mean").shape
            torch.Size([2, 8])
        """
        if pooling not in POOLINGS:
            raise LayoutError(f"pooling must be one of {', '.join(POOLINGS)}, not {pooling!r}.")
        if "cls" in pooling and self.prefix == 0:
            raise LayoutError(f"This backbone has no token before its patches, so pooling={pooling!r} cannot be.")
        parts = [tokens[:, 0]] if "cls" in pooling else []
        if "mean" in pooling:
            parts.append(self.patches(tokens, image_size).flatten(1, -2).mean(dim=1))
        return torch.cat(parts, dim=-1)

    def _check_rank(self, tokens: Tensor) -> None:
        if tokens.ndim != (4 if self.order in MAPS else 3):
            raise LayoutError(f"{self} does not fit a tensor of shape {tuple(tokens.shape)}; override the layout.")
        if self.order not in MAPS and tokens.shape[1] <= self.prefix + self.suffix:
            raise LayoutError(f"{self} leaves no patch of a tensor of shape {tuple(tokens.shape)}; override it.")


def fit_grid(num_patches: int, size: tuple[int, int], stride: int) -> tuple[int, int] | None:
    """Rows and columns of `num_patches` patches of an image; partial patches are dropped or padded."""
    dropped = size[0] // stride, size[1] // stride
    padded = ceil(size[0] / stride), ceil(size[1] / stride)
    return next((grid for grid in (dropped, padded) if grid[0] * grid[1] == num_patches and num_patches > 0), None)


def as_size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """`(height, width)` from an int or a pair; `None` stays `None`, and a `LayoutError` refuses the rest."""
    if image_size is None:
        return None
    sides = (image_size, image_size) if isinstance(image_size, (int, float)) else tuple(image_size)
    numbers = (int, torch.SymInt)  # torch.export has sizes that it does not know yet
    if len(sides) != 2 or not all(isinstance(side, numbers) and side > 0 for side in sides):
        raise LayoutError(f"image_size must be a positive whole number or a pair (height, width), not {image_size!r}.")
    return sides


def check_finite(tokens: Tensor, what: str = "The patch tokens") -> None:
    """Refuses tokens with NaN or Inf: a `NonFiniteTokensError` says what they are, and the way out."""
    if not torch.isfinite(tokens).all():
        dtype = str(tokens.dtype).removeprefix("torch.")
        wide = tokens.dtype in (torch.float32, torch.float64)
        advice = "check the backbone's weights" if wide else "load the backbone with dtype=float32"
        raise NonFiniteTokensError(f"{what} hold NaN or Inf in {dtype}: {advice}.")


def layer_tokens(outputs: Any, layer: int) -> Tensor:
    """The tensor that a head belongs to: `last_hidden_state` for -1, `hidden_states[layer]` otherwise.

    For -1 a backbone without `last_hidden_state` gives the last of its `feature_maps`.
    """
    if layer == -1:
        tokens = getattr(outputs, "last_hidden_state", None)
        tokens = (getattr(outputs, "feature_maps", None) or (None,))[-1] if tokens is None else tokens
        if tokens is None:
            raise BackboneError(f"{type(outputs).__name__} has no last_hidden_state: there are no patch tokens.")
        return tokens
    states = getattr(outputs, "hidden_states", None)
    if not states:
        raise BackboneError(f"The backbone returns no hidden states to clean with layer={layer}; use layer=-1.")
    if layer >= len(states):
        raise BackboneError(f"layer={layer} does not exist: the backbone has hidden states 0 to {len(states) - 1}.")
    return states[layer]


def replace_layer_tokens(outputs: Any, layer: int, tokens: Tensor) -> None:
    """Puts `tokens` where `layer_tokens` reads them."""
    if layer >= 0:
        states = outputs.hidden_states
        outputs["hidden_states"] = (*states[:layer], tokens, *states[layer + 1 :])
    elif "last_hidden_state" in outputs:
        outputs["last_hidden_state"] = tokens
    else:
        outputs["feature_maps"] = (*outputs.feature_maps[:-1], tokens)
