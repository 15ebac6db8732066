"""What a model declares about its patch tokens, and what a probe of it shows."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..runtime.patch_layout import Order, fit_grid
from .plain import PlainBackbone
from .probing import Probe, whole_numbers

CLEAR_LEAD = 3.0
"""A spot counts as evidence if the token that moves most moves this many times as far as the median token."""

FEW_EXTRA_TOKENS = 16
"""A layout that nothing but a probe shows has at most so many tokens that are no patches."""

_PREFIX_PARAMETERS = {"cls_token", "distillation_token", "register_tokens", "class_embedding"}
_SUFFIX_PARAMETERS = {"detection_tokens"}
_NOT_IN_SEQUENCE = ("head.", "pooler.", "decoder.")


def declared_order(probe: Probe, tokens: Tensor) -> Order:
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


def declared_extra_tokens(model: PreTrainedModel, num_tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """Tokens before and after the patches, from what the model declares.

    A module of another library has its tokens with or without those: what its patches leave, comes first.
    """
    if isinstance(model, PlainBackbone):
        patch = model.config.patch_size
        extra = num_tokens - (size[0] // patch) * (size[1] // patch) if patch else 0
        return max(0, extra), 0
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


def declared_frames(config: Any, num_frames: int | None) -> int:
    """How many steps in time the tokens of a clip have; 1 for a still."""
    if num_frames is None:
        return 1
    tubelet = next(whole_numbers(getattr(config, "tubelet_size", None)), 1)
    return max(1, num_frames // tubelet)


def find_stride(num_patches: int, size: tuple[int, int], config: Any) -> int | None:
    """The stride that gives `num_patches`: the config's patch size first, then one that divides the image."""
    candidates = (stride for stride in range(1, max(size) + 1) if fit_grid(num_patches, size, stride))
    declared = declared_strides(config)
    return min(candidates, key=lambda side: (side not in declared, size[0] % side + size[1] % side), default=None)


def possible_strides(num_tokens: int, frames: int, size: tuple[int, int]) -> Iterator[int]:
    """The strides under which all but a few tokens are patches."""
    for stride in range(1, max(size) + 1):
        num_patches = frames * (size[0] // stride) * (size[1] // stride)
        if num_patches > 1 and 0 <= num_tokens - num_patches <= FEW_EXTRA_TOKENS:
            yield stride


def declared_strides(config: Any) -> set[int]:
    """The patch sizes that a config names."""
    return {*whole_numbers(getattr(config, "patch_size", None)), *whole_numbers(getattr(config, "tubelet_size", None))}


def spot_places(probe: Probe, order: Order, grid: tuple[int, int, int], stride: int) -> list[list[int]]:
    """Where the patches of each spot stand among all patches, on a grid of (frames, rows, columns)."""
    frames, rows, columns = grid
    places = []
    for spot in probe.spots:
        frame = spot.frame * frames // (probe.num_frames or 1)
        cells = [row * columns + column for row, column in spot.cells(rows, columns, stride)]
        frames_last = order == "rows_columns_frames"
        places.append([cell * frames + frame if frames_last else frame * rows * columns + cell for cell in cells])
    return places


def probed_prefixes(moves: Tensor, places: list[list[int]]) -> set[int]:
    """The numbers of tokens before the patches under which each spot's patch is the token that moves most."""
    strongest = moves.argmax(dim=1).tolist()
    return set.intersection(*({top - place for place in own} for top, own in zip(strongest, places, strict=True)))


def spots_seen(moves: Tensor, places: list[list[int]]) -> int:
    """How many spots move their own patch at least half as far as any other; `moves` are of the patches alone."""
    return sum(bool(own) and bool(move[own].max() >= move.max() / 2) for move, own in zip(moves, places, strict=True))


def is_clear(moves: Tensor) -> bool:
    """Whether every spot moves one token much further than most."""
    return bool((moves.max(dim=1).values > CLEAR_LEAD * moves.median(dim=1).values).all())
