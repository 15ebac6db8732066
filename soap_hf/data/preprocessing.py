"""From images to the pixels that a backbone expects: one image processor, one size, real and synthetic alike."""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import logging
from transformers.utils.hub import cached_file

from ..compat import AutoImageProcessor
from ..runtime.errors import DataError, first_sentence
from ..runtime.head_files import PROCESSOR_FILE

logger = logging.get_logger(__name__)

MAX_ASPECT = 32
"""A longer image is cropped about its centre before its short side is resized, which could fill the memory."""

_COLOURS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def load_image_processor(name_or_path: str | None, fallback_size: tuple[int, int], **hub_kwargs: Any) -> Any:
    """The image processor of a backbone, or the documented default: RGB, bicubic, ImageNet mean and std.

    A warning says so if it is the default, of `fallback_size` (`(height, width)`); `hub_kwargs` reach the Hub.

    Raises:
        DataError: the backbone has one that cannot be read.
    """
    reason = "a model in memory brings none"
    if name_or_path:
        try:
            return AutoImageProcessor.from_pretrained(name_or_path, **hub_kwargs)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            reason = first_sentence(error)
            known = {name: value for name, value in hub_kwargs.items() if name in ("revision", "token", "cache_dir")}
            quiet = {"_raise_exceptions_for_missing_entries": False}
            there = not isinstance(error, ImportError) and cached_file(name_or_path, PROCESSOR_FILE, **quiet, **known)
            if there:
                raise DataError(
                    f"The image processor of {name_or_path} cannot be read ({reason}); mend it, or pass another."
                ) from error
    height, width = fallback_size
    logger.warning(
        f"No image processor for {name_or_path or 'this backbone'} ({reason}): images are made RGB, resized to "
        f"{height} x {width} (bicubic) and normalised with the ImageNet mean and std; pass image_processor to "
        "choose another."
    )
    colours = {"image_mean": list(IMAGENET_DEFAULT_MEAN), "image_std": list(IMAGENET_DEFAULT_STD)}
    return _plain_processor(fallback_size, **colours)


def timm_processor(settings: Mapping[str, Any]) -> Any:
    """The image processor that timm's `pretrained_cfg` describes: its size, crop, interpolation, mean and std.

    Images are resized so that the crop is `crop_pct` of them: about the shorter side, or squashed if `crop_mode` says
    so.

    Raises:
        DataError: it has no input size, mean or std.

    Example:
        >>> processor = timm_processor({"input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.5,) * 3})
        >>> processor(Image.new("RGB", (300, 200)), return_tensors="pt")["pixel_values"].shape
        torch.Size([1, 3, 224, 224])
    """
    try:
        _, height, width = settings["input_size"]
        colours = {"image_mean": list(settings["mean"]), "image_std": list(settings["std"])}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError("The pretrained_cfg has no input_size, mean or std; pass image_processor.") from error
    share, mode = settings.get("crop_pct") or 0.875, settings.get("crop_mode") or "center"
    resample = _TIMM_FILTERS.get(str(settings.get("interpolation")), Image.Resampling.BICUBIC)
    crop = {"height": height, "width": width}
    size: dict[str, int] = {"shortest_edge": math.floor(max(height, width) / share)}
    if mode == "squash":
        size = {"height": math.floor(height / share), "width": math.floor(width / share)}
    return CLIPImageProcessorPil(size=size, crop_size=crop, resample=resample, do_convert_rgb=True, **colours)


_TIMM_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


def with_colours(processor: Any, mean: Any = None, std: Any = None) -> Any:
    """The processor with another mean and std of the three channels, where they are given."""
    given = {"image_mean": mean, "image_std": std}
    given = {name: list(value) for name, value in given.items() if value is not None}
    return type(processor).from_dict({**processor.to_dict(), **given}) if given else processor


def _plain_processor(size: tuple[int, int], **colours: Any) -> Any:
    """A processor that resizes to `size` and no more, bicubic, and treats colours as it is told."""
    resize: Any = {"size": {"height": size[0], "width": size[1]}, "resample": Image.Resampling.BICUBIC}
    return ViTImageProcessorPil(do_convert_rgb=True, **resize, **colours)


class ImagePreprocessor:
    """Turns one image into the pixels of one size that a backbone expects.

    Args:
        processor: a transformers image processor.
        image_size (`(height, width)`, *optional*): the model's input size; default: the processor's own. Its resize is
            scaled in proportion to its crop; if it keeps the aspect ratio, images are cropped about their centre.
        native_size (`(height, width)`, *optional*): the backbone's, for a processor that has no size of its own.

    A processor that has no fixed height and width (SigLIP 2, Pixtral) or makes clips gives way to a plain one with its
    colours, said aloud.

    Raises:
        DataError: the processor does not make images of one size.
    """

    def __init__(
        self, processor: Any, image_size: tuple[int, int] | None = None, native_size: tuple[int, int] | None = None
    ):
        self.processor = processor
        own_size = _own_size(processor)
        image_size = image_size or (native_size if own_size is None else None)
        if image_size is None and own_size is None:
            raise DataError(f"{type(processor).__name__} has no fixed size; pass image_size.")
        self.size: tuple[int, int] = image_size or own_size  # type: ignore[assignment]
        self._kwargs = {} if image_size in (None, own_size) else _size_kwargs(processor, self.size)
        self._keeps_aspect = _size(processor) is None
        self._crops = not _crop(processor) and self._keeps_aspect
        problem = self._problem()
        packs = _size(processor) is None and _edge(processor) is None
        if problem and (packs or "Video" in type(processor).__name__):
            logger.warning(f"{problem} Images are resized to {self.size[0]} x {self.size[1]} pixels instead.")
            colours = {name: getattr(processor, name) for name in _COLOURS}
            self.processor, self._kwargs = _plain_processor(self.size, **colours), {}
            self._crops = self._keeps_aspect = False
            problem = self._problem()
        if problem:
            raise DataError(f"{problem} Choose another image_size or image processor.")

    def __call__(self, image: Image.Image) -> Tensor:
        """Pixels of one image, `(3, height, width)` float32."""
        image = to_rgb(image)
        if self._crops:
            image = _crop_to_aspect(image, self.size)
        elif self._keeps_aspect and max(image.size) > MAX_ASPECT * min(image.size):
            width, height = (min(side, MAX_ASPECT * min(image.size)) for side in image.size)
            image = _crop_to_aspect(image, (height, width))
        pixels = self.processor(image, return_tensors="pt", **self._kwargs)["pixel_values"]
        return torch.as_tensor(pixels[0], dtype=torch.float32)

    def of_example(self, example: Any) -> Tensor:
        """Pixels of the image of an [`Example`]."""
        return self(example.image)

    def normalize(self, rgb: Tensor) -> Tensor:
        """Scale, mean, std and channel order of the processor applied to RGB `(B, 3, H, W)` of nominal range [0, 1].

        It is neither clipped nor rounded nor resized.
        """
        shift, matrix = (part.to(rgb.device) for part in self._colour_map)
        return torch.einsum("oc,bchw->bohw", matrix, rgb) + shift.view(1, 3, 1, 1)

    def resized_processor(self) -> Any:
        """The processor with this size for its own, to be saved beside a head."""
        if not self._kwargs:
            return self.processor
        return type(self.processor).from_dict({**self.processor.to_dict(), **self._kwargs})

    @cached_property  # plain images pass through the whole processor
    def _colour_map(self) -> tuple[Tensor, Tensor]:
        """Shift `(3,)` and matrix `(3, 3)` of the processor's affine map of colours, read off plain images."""
        row, column = self.size[0] // 2, self.size[1] // 2
        colours = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))
        seen = [self(Image.new("RGB", self.size[::-1], colour))[:, row, column] for colour in colours]
        return seen[0], torch.stack([colour - seen[0] for colour in seen[1:]], dim=1)

    def _problem(self) -> str | None:
        """Why two images of different shape do not come out in one size, in a sentence; `None` if they do."""
        name = type(self.processor).__name__
        for shape in ((300, 200), (170, 310)):
            try:
                got = tuple(self(Image.new("RGB", shape)).shape)
            except (ValueError, RuntimeError, KeyError, TypeError) as error:
                height, width = self.size
                return f"{name} cannot make images of {height} x {width} pixels ({first_sentence(error)})."
            if got != (3, *self.size):
                return f"{name} makes pixels of shape {got}, not (3, {self.size[0]}, {self.size[1]})."
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, 8 bit: palette, grey, CMYK and alpha as Pillow converts them, 16 bit scaled down rather than clipped."""
    if image.mode in ("I", "F"):
        raise DataError(f"pixels of mode {image.mode!r} have no known range; save the image with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")


def _size(processor: Any, name: str = "size") -> tuple[int, int] | None:
    """`(height, width)`, if the processor has them."""
    size = dict(getattr(processor, name, None) or {})
    height, width = size.get("height"), size.get("width")
    return None if height is None or width is None else (height, width)


def _edge(processor: Any) -> int | None:
    return dict(getattr(processor, "size", None) or {}).get("shortest_edge")


def _crop(processor: Any) -> tuple[int, int] | None:
    return _size(processor, "crop_size") if getattr(processor, "do_center_crop", False) else None


def _own_size(processor: Any) -> tuple[int, int] | None:
    """`(height, width)` of what the processor makes: its crop, else its size; a shortest edge alone gives a square."""
    if size := _crop(processor) or _size(processor):
        return size
    edge = _edge(processor)
    patches, patch = getattr(processor, "max_num_patches", None), getattr(processor, "patch_size", None)
    if isinstance(patches, int) and isinstance(patch, int):
        edge = round(patches**0.5) * patch
    return None if edge is None else (edge, edge)


def _size_kwargs(processor: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Arguments that make the processor give `size`."""
    height, width = size
    crop, edge = _crop(processor), _edge(processor)
    if not crop:
        return {"size": {"shortest_edge": min(size)} if edge is not None else {"height": height, "width": width}}
    scale = max(height / crop[0], width / crop[1])
    if edge is not None:
        resize = {"shortest_edge": max(height, width, round(edge * scale))}
    else:
        own = _size(processor) or crop
        resize = {"height": round(own[0] * height / crop[0]), "width": round(own[1] * width / crop[1])}
    return {"size": resize, "crop_size": {"height": height, "width": width}}


def _crop_to_aspect(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest centred part of the image with the aspect ratio of `size`."""
    scale = min(image.height / size[0], image.width / size[1])
    height, width = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    top, left = (image.height - height) // 2, (image.width - width) // 2
    return image.crop((left, top, left + width, top + height))
