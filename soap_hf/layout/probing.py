"""Looking at a backbone: what it returns for an image, and which tokens move when one spot of the image changes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..runtime.errors import BackboneError, LayoutError, NonFiniteTokensError, first_sentence
from ..runtime.patch_layout import check_finite, layer_tokens
from ..runtime.vision_backbone import CallConvention, native_image_size, unmasked
from .plain import name_of

PATCHES_PER_SIDE = 8
"""Of the small image at which a model is looked at first: what merges or pools patches by 2, 4 or 8 takes it too."""

CALL_ERRORS = (ValueError, RuntimeError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError)
"""What models raise that are given what they do not take."""

Found = TypeVar("Found")


@dataclass(frozen=True)
class Spot:
    """A rectangle of the image that a probe changes: pixels `[top, bottom)` and `[left, right)`, in one frame."""

    top: int
    bottom: int
    left: int
    right: int
    frame: int

    def cells(self, rows: int, columns: int, stride: int) -> set[tuple[int, int]]:
        """The patches of a grid that the spot touches."""
        return {
            (row, column)
            for row in range(self.top // stride, min(rows, (self.bottom - 1) // stride + 1))
            for column in range(self.left // stride, min(columns, (self.right - 1) // stride + 1))
        }


class Probe:
    """One forward pass of a backbone over a noise image, the same again, and copies of it with one `Spot` changed.

    The model is left as it was; `hidden_states` looks at those as well. Without `spots` it is given one image, which
    is enough where the layout is known. A `BackboneError` says that it cannot take images of `size`, which is
    `(height, width)`.
    """

    def __init__(
        self, model: PreTrainedModel, size: tuple[int, int], hidden_states: bool = False, *, spots: bool = True
    ):
        self.model, self.size, self.hidden_states = model, size, hidden_states
        backbone = unmasked(model)
        convention = CallConvention.of(backbone)
        self.num_frames = convention.num_frames
        self.spots = _spots(model.config, size, (self.num_frames or 1) - 1) if spots else ()
        parameter = next(model.parameters())
        pixels = self._pixels(getattr(model.config, "num_channels", None) or 3).to(parameter.device, parameter.dtype)
        arguments = convention.complete(pixels, {"output_hidden_states": True} if hidden_states else {})
        with torch.no_grad(), evaluation_mode(backbone):
            try:
                self.outputs = backbone(**arguments)
            except BackboneError:
                raise
            except CALL_ERRORS as error:
                raise BackboneError(
                    f"{name_of(model)} cannot take images of {size[0]} x {size[1]} pixels "
                    f"({first_sentence(error)}); choose another image_size or backbone."
                ) from error

    @property
    def num_images(self) -> int:
        """How many images or clips went in."""
        return len(self.spots) + 2 if self.spots else 1

    def tokens(self, layer: int) -> Tensor:
        """What the backbone returned: `(B, N, D)`, `(1, sum N, D)` or a map, which is alike for the same image."""
        tokens = layer_tokens(self.outputs, layer)
        if not isinstance(tokens, Tensor) or tokens.ndim not in (3, 4):
            what = f"a tensor of shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else "several tensors"
            raise BackboneError(
                f"{name_of(self.model)} returns {what} as layer {layer}, which holds no patch tokens: SOAP "
                "needs a token for each patch, not pooled features."
            )
        if len(tokens) not in (1, self.num_images):
            raise BackboneError(
                f"Layer {layer} of {name_of(self.model)} has {len(tokens)} rows for {self.num_images} images or "
                "clips, so its tokens cannot be laid out; choose another layer."
            )
        check_finite(tokens, f"The tokens of {name_of(self.model)}")
        tolerance = max(1e-3, 16 * torch.finfo(tokens.dtype).eps) * max(1.0, float(tokens[0].abs().max()))
        if len(tokens) == self.num_images > 1 and (tokens[0] - tokens[1]).abs().max() > tolerance:
            raise BackboneError(
                f"{name_of(self.model)} answers differently to the same image: it masks its input or drops "
                "patches at random; switch that off in its config."
            )
        return tokens

    def moves(self, layer: int) -> Tensor:
        """How far each token moves for each spot, `(len(spots), N)`; for `(B, N, D)` and packed tokens."""
        tokens = self.tokens(layer).cpu().double()  # MPS has no float64
        tokens = tokens.reshape(self.num_images, -1, tokens.shape[-1])
        return (tokens[2:] - tokens[0]).norm(dim=-1)

    def _pixels(self, channels: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        clip = torch.randn(1, channels, *self.size, generator=generator).repeat(self.num_frames or 1, 1, 1, 1)
        images = [clip, clip] if self.spots else [clip]
        for spot in self.spots:
            poked = clip.clone()
            region = poked[spot.frame, :, spot.top : spot.bottom, spot.left : spot.right]
            region.copy_(5 * torch.randn(region.shape, generator=generator))
            images.append(poked)
        clips = torch.stack(images)
        return clips if self.num_frames is not None else clips.squeeze(1)


def _spots(config: Any, size: tuple[int, int], last_frame: int) -> tuple[Spot, ...]:
    """Bottom left, top right, and one off the centre: no two of them in a row, a column or a diagonal.

    Each is a patch, if the config names its size, else an eighth of the image.
    """
    side = min(min(whole_numbers(getattr(config, "patch_size", None)), default=max(1, min(size) // 8)), *size)
    last_row, last_column = size[0] // side - 1, size[1] // side - 1
    cells = ((last_row, 0, last_frame), (0, last_column, 0), (last_row // 2, 2 * last_column // 3, last_frame))
    return tuple(
        Spot(row * side, (row + 1) * side, column * side, (column + 1) * side, frame) for row, column, frame in cells
    )


def whole_numbers(value: Any) -> Iterator[int]:
    """The whole numbers in an int, or in nested lists of them; none in anything else."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from whole_numbers(part)


def probe_size(model: PreTrainedModel) -> tuple[int, int]:
    """The size at which to look at a model: its native one, else 224 x 224."""
    return native_image_size(model.config) or (224, 224)


def probe_sizes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """The sizes at which to look at a model, in turn: a few patches, if it names their size, and `probe_size`."""
    native, patch = probe_size(model), max(whole_numbers(getattr(model.config, "patch_size", None)), default=0)
    small = PATCHES_PER_SIDE * patch, PATCHES_PER_SIDE * patch
    return [small, native] if 0 < small[0] < min(native) else [native]


def at_first_size(sizes: Sequence[tuple[int, int]], look: Callable[[tuple[int, int]], Found]) -> Found:
    """What `look` finds at the first size that a model takes; an error at the last one stands."""
    for size in sizes[:-1]:
        with suppress(BackboneError, LayoutError, NonFiniteTokensError):
            return look(size)
    return look(sizes[-1])


_SHRINKS = "set_shift_and_window_size"


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Runs a block with the model in evaluation mode, then puts every module back as it was."""
    training = [(module, module.training) for module in model.modules()]
    # Swin shrinks its windows for good when an image is smaller than one
    windows = [(part, part.window_size, part.shift_size) for part in model.modules() if hasattr(part, _SHRINKS)]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for part, window_size, shift_size in windows:
            part.window_size, part.shift_size = window_size, shift_size
