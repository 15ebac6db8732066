"""What a model says about its patch tokens, and what a probe of it shows."""

import math
from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from .probing import Probe, Spot, whole_numbers

Order = Literal["tokens", "frames_rows_columns", "rows_columns_frames", "packed", "channels_first", "channels_last"]
ORDERS: tuple[Order, ...] = (
    "tokens",
    "frames_rows_columns",
    "rows_columns_frames",
    "packed",
    "channels_first",
    "channels_last",
)
MAPS: tuple[Order, ...] = ("channels_first", "channels_last")
CLIPS: tuple[Order, ...] = ("frames_rows_columns", "rows_columns_frames")

CLEAR_LEAD = 3.0
"""A spot counts as evidence if the token that moves most moves this many times as far as the median token."""

FEW_EXTRA_TOKENS = 16
"""A layout that nothing but a probe shows has at most so many tokens that are no patches."""

_PREFIX_PARAMETERS = {"cls_token", "distillation_token", "register_tokens", "class_embedding"}
_SUFFIX_PARAMETERS = {"detection_tokens"}
_NOT_IN_SEQUENCE = ("head.", "pooler.", "decoder.")


def said_order(probe: Probe, tokens: Tensor) -> Order:
    """The order of a tensor that a model returned for a probe."""
    if tokens.ndim == 4:
        return _map_order(probe, tokens)
    if len(tokens) == 1 < probe.num_images:
        return "packed"
    if probe.num_frames is None:
        return "tokens"
    return "rows_columns_frames" if probe.model.config.model_type == "timesformer" else "frames_rows_columns"


def _map_order(probe: Probe, tokens: Tensor) -> Order:
    """Channels first or last: whichever two dimensions have the image's shape, else what the model says."""
    _, first, second, third = tokens.shape
    if _has_shape(second, third, probe.size) != _has_shape(first, second, probe.size):
        return "channels_first" if _has_shape(second, third, probe.size) else "channels_last"
    timm_format = getattr(getattr(probe.model, "timm_model", None), "output_fmt", None)
    channels_last = probe.model.config.model_type.startswith("sam2") or str(timm_format).endswith("NHWC")
    return "channels_last" if channels_last else "channels_first"


def _has_shape(rows: int, columns: int, size: tuple[int, int]) -> bool:
    stride = size[0] / rows
    return stride >= 1 and abs(size[1] / stride - columns) < 1


def said_extra_tokens(model: PreTrainedModel) -> tuple[int, int]:
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


def said_frames(config: Any, num_frames: int | None) -> int:
    """How many steps in time the tokens of a clip have; 1 for a still."""
    if num_frames is None:
        return 1
    tubelet = next(whole_numbers(getattr(config, "tubelet_size", None)), 1)
    return max(1, num_frames // tubelet)


def find_stride(num_patches: int, size: tuple[int, int], config: Any) -> int | None:
    """The stride that gives `num_patches`: the config's patch size first, then one that divides the image."""
    candidates = [stride for stride in range(1, max(size) + 1) if fit_grid(num_patches, size, stride)]
    said = said_strides(config)
    return min(candidates, key=lambda stride: (stride not in said, size[0] % stride + size[1] % stride), default=None)


def possible_strides(num_tokens: int, frames: int, size: tuple[int, int]) -> Iterator[int]:
    """The strides under which all but a few tokens are patches."""
    for stride in range(1, max(size) + 1):
        num_patches = frames * (size[0] // stride) * (size[1] // stride)
        if num_patches > 1 and 0 <= num_tokens - num_patches <= FEW_EXTRA_TOKENS:
            yield stride


def said_strides(config: Any) -> set[int]:
    """The patch sizes that a config names."""
    return {*whole_numbers(getattr(config, "patch_size", None)), *whole_numbers(getattr(config, "tubelet_size", None))}


def fit_grid(num_patches: int, size: tuple[int, int], stride: int) -> tuple[int, int] | None:
    """Rows and columns of `num_patches` patches of an image; partial patches are dropped or padded."""
    return next((grid for grid in _grids(size, stride) if grid[0] * grid[1] == num_patches and num_patches > 0), None)


def _grids(size: tuple[int, int], stride: int) -> Iterator[tuple[int, int]]:
    yield size[0] // stride, size[1] // stride
    yield math.ceil(size[0] / stride), math.ceil(size[1] / stride)


def shown_prefixes(
    moves: Tensor, spots: tuple[Spot, ...], order: Order, grid: tuple[int, int, int], stride: int, num_frames: int
) -> set[int]:
    """The numbers of tokens before the patches under which each spot's patch is the token that moves most."""
    shown: set[int] | None = None
    for move, spot in zip(moves, spots, strict=True):
        prefixes = {int(move.argmax()) - place for place in _places(spot, order, grid, stride, num_frames)}
        shown = prefixes if shown is None else shown & prefixes
    return shown or set()


def spots_seen(
    moves: Tensor, spots: tuple[Spot, ...], order: Order, grid: tuple[int, int, int], stride: int, num_frames: int,
    prefix: int,
) -> int:  # fmt: skip
    """How many spots move their own patch at least half as far as any other patch."""
    seen = 0
    for move, spot in zip(moves, spots, strict=True):
        # among patches alone: a CLS or register token with massive activations may move further than all
        patches = move[prefix : prefix + grid[0] * grid[1] * grid[2]]
        own = list(_places(spot, order, grid, stride, num_frames))
        seen += bool(own) and bool(patches[own].max() >= patches.max() / 2)
    return seen


def is_clear(moves: Tensor) -> bool:
    """Whether every spot moves one token much further than most."""
    return bool((moves.max(dim=1).values > CLEAR_LEAD * moves.median(dim=1).values).all())


def _places(spot: Spot, order: Order, grid: tuple[int, int, int], stride: int, num_frames: int) -> Iterator[int]:
    """Where the patches of a spot stand among all patches."""
    frames, rows, columns = grid
    frame = spot.frame * frames // num_frames
    for row, column in spot.cells(rows, columns, stride):
        if order == "rows_columns_frames":
            yield (row * columns + column) * frames + frame
        else:
            yield (frame * rows + row) * columns + column
