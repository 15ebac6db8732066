"""Where the patch tokens lie in a backbone's output."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .errors import HeadError, LayoutError
from .layout_evidence import (
    CLIPS,
    MAPS,
    ORDERS,
    Order,
    find_stride,
    fit_grid,
    is_clear,
    possible_strides,
    said_extra_tokens,
    said_frames,
    said_order,
    said_strides,
    shown_prefixes,
    spots_seen,
)
from .probing import Probe, probe_size

SPOTS_NEEDED = 2
"""Spots of a probe that must move their own patch: one alone may lie on the diagonal of a transposed grid."""


@dataclass(frozen=True)
class PatchLayout:
    """Where the patch tokens lie in the tensor that a backbone returns.

    Attributes:
        order (`str`, defaults to `"tokens"`): `"tokens"` for (B, N, D) in raster order; `"frames_rows_columns"` and
            `"rows_columns_frames"` for (B, N, D) of clips; `"packed"` for (1, sum N, D), image after image;
            `"channels_first"` for (B, D, H, W); `"channels_last"` for (B, H, W, D).
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
        return cls.from_probe(Probe(model, size, layer >= 0), layer, **overrides)

    @classmethod
    def from_probe(cls, probe: Probe, layer: int = -1, **overrides: Any) -> "PatchLayout":
        """Finds the layout from one probe of a model; see `detect`."""
        unknown = set(overrides) - {field.name for field in fields(cls)}
        if unknown:
            raise LayoutError(f"A patch layout has no field {', '.join(sorted(unknown))}.")
        model, tokens = probe.model, probe.tokens(layer)
        order = overrides.get("order") or said_order(probe, tokens)
        if order in MAPS:
            return cls(**{"order": order, **overrides})
        num_tokens = tokens.shape[1] // probe.num_images if order == "packed" else tokens.shape[1]
        prefix, suffix = said_extra_tokens(model)
        said: dict[str, Any] = {"order": order, "prefix": prefix, "suffix": suffix} | overrides
        num_patches = num_tokens - said["prefix"] - said["suffix"]
        frames = said_frames(model.config, probe.num_frames)
        if said.get("stride") is None and num_patches % frames == 0:
            said["stride"] = find_stride(num_patches // frames, probe.size, model.config)
        if said.get("stride") is not None:
            layout = cls(**said)
            if not overrides:
                layout._confirm(probe, layer, num_patches)
            return layout
        shown = None if overrides else cls._from_moves(probe, layer, order, num_tokens, frames)
        if shown is None:
            raise LayoutError(
                f"{type(model).__name__} returns {num_tokens} tokens for an image of {probe.size[0]} x "
                f"{probe.size[1]} pixels; without {said['prefix']} before and {said['suffix']} after them, "
                f"{num_patches} patches form no grid: pass a PatchLayout(prefix=…, suffix=…, stride=…)."
            )
        return shown

    @classmethod
    def _from_moves(cls, probe: Probe, layer: int, order: Order, num_tokens: int, frames: int) -> "PatchLayout | None":
        """The only layout under which each spot moves its own patch: of the config's patch size, else of another."""
        moves = probe.moves(layer)
        if not is_clear(moves):
            return None
        said = said_strides(probe.model.config)
        for strides in (said, possible_strides(num_tokens, frames, probe.size)):
            found = []
            for stride in strides:
                grid = frames, probe.size[0] // stride, probe.size[1] // stride
                num_patches = grid[0] * grid[1] * grid[2]
                for prefix in shown_prefixes(moves, probe.spots, order, grid, stride, probe.num_frames or 1):
                    suffix = num_tokens - prefix - num_patches
                    if prefix >= 0 and suffix >= 0 and num_patches > 1:
                        found.append(cls(order=order, prefix=prefix, suffix=suffix, stride=stride))
            if len(found) == 1:
                return found[0]
        return None

    def _confirm(self, probe: Probe, layer: int, num_patches: int) -> None:
        """Refuses the layout if the tokens that move are clearly not those that it says.

        Raises:
            LayoutError: prints both, and how to override.
        """
        moves, stride, num_frames = probe.moves(layer), self.stride or 1, probe.num_frames or 1
        *frames, rows, columns = self.grid(probe.size, num_patches)
        grid = (frames[0] if frames else 1, rows, columns)
        if spots_seen(moves, probe.spots, self.order, grid, stride, num_frames, self.prefix) >= SPOTS_NEEDED:
            return
        # moves that are not clear refute nothing, but a stride that nobody named needs their support
        if not is_clear(moves) and stride in said_strides(probe.model.config):
            return
        shown = shown_prefixes(moves, probe.spots, self.order, grid, stride, num_frames)
        hint = f"with {min(shown)} tokens before the patches" if shown else "in no raster order"
        raise LayoutError(
            f"{type(probe.model).__name__}'s parameters say {self}, but changing spots of an image moves tokens as if "
            f"they lay {hint} (layer {layer}): choose another layer, or pass a PatchLayout to say which holds."
        )

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

    def grid(self, image_size: int | tuple[int, int] | None, num_patches: int) -> tuple[int, ...]:
        """Rows and columns (frames, rows and columns of a clip) of `num_patches` patches of one image.

        Partial patches at the border are dropped or padded, whichever gives `num_patches`.

        Raises:
            LayoutError: neither does, or the stride is not known.
        """
        size = as_size(image_size)
        if self.stride is None or size is None:
            raise LayoutError(
                "The grid of (B, N, D) tokens needs a stride and an image size; pass PatchLayout(stride=…)."
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
        if self.order == "packed":
            return self._unpacked(tokens, image_size)
        patches = tokens[:, self.prefix : tokens.shape[1] - self.suffix]
        grid = self.grid(image_size, patches.shape[1])
        if self.order == "rows_columns_frames":
            return patches.unflatten(1, (*grid[1:], grid[0])).movedim(3, 1)
        return patches.unflatten(1, grid)

    def _unpacked(self, tokens: Tensor, image_size: int | tuple[int, int] | None) -> Tensor:
        """Packed tokens of images of one size, `(B, rows, columns, D)`."""
        size, stride = as_size(image_size) or (0, 0), self.stride or 1
        rows, columns = size[0] // stride, size[1] // stride
        if len(tokens) != 1 or rows * columns == 0 or tokens.shape[1] % (rows * columns):
            raise LayoutError(
                f"Packed tokens of shape {tuple(tokens.shape)} are no grids of stride {stride} over {size[0]} x "
                f"{size[1]} pixels: lay out images of one size at a time."
            )
        return tokens.view(-1, rows, columns, tokens.shape[-1])

    def map_patches(self, tokens: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Applies `function` (on `(..., D)`) to the patch tokens; prefix and suffix pass through untouched.

        Raises:
            LayoutError: the tokens do not lie as this layout says.
        """
        self._check_rank(tokens)
        if self.order == "channels_first":
            return function(tokens.movedim(1, -1)).movedim(-1, 1)
        if self.order in ("channels_last", "packed") or self.prefix == self.suffix == 0:
            return function(tokens)
        end = tokens.shape[1] - self.suffix
        clean = function(tokens[:, self.prefix : end])
        return torch.cat((tokens[:, : self.prefix], clean, tokens[:, end:]), dim=1)

    def _check_rank(self, tokens: Tensor) -> None:
        if tokens.ndim != (4 if self.order in MAPS else 3):
            raise LayoutError(f"{self} does not fit a tensor of shape {tuple(tokens.shape)}; override the layout.")
        if self.order not in MAPS and tokens.shape[1] <= self.prefix + self.suffix:
            raise LayoutError(
                f"{self} leaves no patch in a tensor of shape {tuple(tokens.shape)}; override the layout."
            )


def as_size(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """`(height, width)` from an int or a pair; `None` stays `None`.

    Raises:
        LayoutError: anything else, or not positive.
    """
    if image_size is None:
        return None
    sides = (image_size, image_size) if isinstance(image_size, (int, float)) else tuple(image_size)
    numbers = (int, torch.SymInt)  # torch.export has sizes that it does not know yet
    if len(sides) != 2 or not all(isinstance(side, numbers) and side > 0 for side in sides):
        raise LayoutError(f"image_size must be a positive whole number or a pair (height, width), not {image_size!r}.")
    return sides
