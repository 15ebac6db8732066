"""What is kept of each image: pooled vectors or patch tokens, of one layer or several, clean and perhaps raw."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from ..data.loading import Example
from ..data.preprocessing import ImagePreprocessor
from ..evaluation.masks import read_mask
from ..heads.model import SOAPModelWrapper
from ..layout.probing import evaluation_mode
from ..runtime.errors import DataError, LayoutError
from ..runtime.patch_layout import Pooling, check_finite, layer_tokens
from .arguments import ExtractArguments

FEATURES, RAW, PATCHES = "features", "raw_", "patches"
"""Names of the column of features (with its layer, if there are several), of raw ones, and of the patches' numbers."""

Columns = dict[str, Tensor | list[Tensor]]
"""Of a batch: `(B, D)` or `(B, *grid, D)`; lists where images have different numbers of patches."""


def column_names(layers: Sequence[int], with_raw: bool) -> dict[int, list[str]]:
    """The columns of features of each layer: clean ones, and raw ones if they are kept."""
    clean = {layer: FEATURES if len(layers) == 1 else f"{FEATURES}_{layer}" for layer in layers}
    return {layer: [name, RAW + name] if with_raw else [name] for layer, name in clean.items()}


@dataclass(frozen=True)
class Kept:
    """Which features are kept, and how they are made."""

    model: SOAPModelWrapper
    preprocess: ImagePreprocessor
    layers: tuple[int, ...]
    pooling: Pooling | None  # none: patch tokens
    every: int
    inside: bool
    numbers_patches: bool
    dtype: torch.dtype
    normalize: bool
    with_raw: bool

    @classmethod
    def of(cls, model: SOAPModelWrapper, preprocess: ImagePreprocessor, chosen: ExtractArguments) -> "Kept":
        """What the arguments ask for.

        Raises:
            DataError: the head has not such a layer, or several and none is named.
        """
        own, layers = list(model.config.layers), chosen.layers
        if layers is None and len(own) > 1:
            raise DataError(f"The head cleans layers {', '.join(map(str, own))}; choose with layer=….")
        layers = layers or tuple(own)
        if missing := [layer for layer in layers if layer not in own]:
            raise DataError(f"The head cleans no layer {missing[0]}, but {', '.join(map(str, own))}; choose of those.")
        pooling: Any = None if chosen.patches else chosen.pooling
        dtype, inside = getattr(torch, chosen.kept_as), chosen.inside is not None
        ways: dict[str, Any] = {"normalize": chosen.normalize, "with_raw": chosen.with_raw}
        return cls(model, preprocess, layers, pooling, chosen.every, inside, chosen.numbers_patches, dtype, **ways)

    @property
    def names(self) -> dict[int, list[str]]:
        """The columns of features of each layer."""
        return column_names(self.layers, self.with_raw)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one image's features in each column, found on an empty image; errors as the model's."""
        pixels = self.preprocess.normalize(torch.zeros(1, 3, *self.preprocess.size))
        found = self.columns([(pixels[0], torch.ones(self.preprocess.size)) if self.inside else pixels[0]])
        return {name: tuple(found[name][0].shape) for names in self.names.values() for name in names}

    @property
    def bytes_per_row(self) -> int:
        """What the features of an image take at most."""
        size = torch.empty(0, dtype=self.dtype).element_size()
        return sum(size * torch.Size(shape).numel() for shape in self.shapes.values())

    def prepare(self, example: Example) -> Any:
        """The pixels of an image; and if its mask counts, how far each of them lies inside, `(H, W)`."""
        pixels = self.preprocess(example.image)
        if not self.inside or example.mask is None:
            return pixels
        return pixels, self._share_inside(example.mask)

    def _share_inside(self, mask: Image.Image) -> Tensor:
        """The mask as the image processor crops and resizes its image: it is given to it as one."""
        drawn = Image.fromarray(read_mask(mask).object).convert("RGB")
        empty, full = (self.preprocess.normalize(torch.full((1, 3, 1, 1), value))[0] for value in (0.0, 1.0))
        return ((self.preprocess(drawn) - empty) / (full - empty)).mean(dim=0)

    def columns(self, values: Any) -> Columns:
        """The features of a batch of what `prepare` gives, of the dtype in which they are kept, on the CPU.

        Raises:
            NonFiniteTokensError: they hold NaN or Inf.
            DataError: they are too large for the dtype in which they are kept.
        """
        return self.begin(values)()

    @torch.no_grad()
    def begin(self, values: Any) -> Callable[[], Columns]:
        """Begins with a batch, and gives what waits for its features: an accelerator works on meanwhile."""
        inside: Tensor | None = None
        if self.inside:
            inside = torch.stack([mask for _, mask in values])
            values = [pixels for pixels, _ in values]
        pixels = values if isinstance(values, Tensor) else torch.stack(values)
        size = (pixels.shape[-2], pixels.shape[-1])
        with evaluation_mode(self.model):
            outputs = self.model(
                pixels.to(self.model.device, self.model.dtype, non_blocking=True), output_raw=self.with_raw
            )
        found: dict[str, Tensor] = {}
        fits: dict[str, Tensor] = {}
        for layer, names in self.names.items():
            sources = [layer_tokens(outputs, layer)]
            if self.with_raw:
                sources.append(
                    outputs["raw_last_hidden_state"] if layer == -1 else outputs["raw_hidden_states"][layer]
                )
            for name, tokens in zip(names, sources, strict=True):
                features = self._of_tokens(layer, tokens, size).float()
                stored = (normalize(features, dim=-1) if self.normalize else features).to(self.dtype)
                found[name], fits[name] = _begin_to_copy(stored), torch.isfinite(features).all()
        copied = torch.cuda.Event() if self.model.device.type == "cuda" else None
        if copied is not None:
            copied.record()

        def wait() -> Columns:
            if copied is not None:
                copied.synchronize()
            for name, features in found.items():
                if not fits[name]:
                    check_finite(features.to(self.model.dtype), "The features")
                self._refuse_overflow(features)
            return self._chosen(found, inside) if self.numbers_patches else dict(found)

        return wait

    def _refuse_overflow(self, features: Tensor) -> None:
        if not torch.isfinite(features).all():
            kept = str(self.dtype).removeprefix("torch.")
            raise DataError(f"The features are too large for {kept}; store them as float32, or normalized.")

    def _of_tokens(self, layer: int, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        layout = self.model.layouts[layer]
        if self.pooling is not None:
            return layout.pooled(tokens, size, self.pooling)
        return layout.patches(tokens, size)

    def _chosen(self, found: dict[str, Tensor], inside: Tensor | None) -> Columns:
        """Of patch tokens those that are kept, and their numbers, which are alike in all columns."""
        grids = sorted({tuple(tokens.shape[1:-1]) for tokens in found.values()})
        grid: Any = grids[0] if len(grids) == 1 else None
        if grid is None or (inside is not None and len(grid) != 2):
            raise LayoutError(
                f"Patches lie on {' and '.join(map(str, grids))}, of which none can be chosen alike; extract "
                "layers one by one, and of clips all patches."
            )
        numbers = torch.arange(torch.Size(grid).numel()).view(grid)
        picked = numbers[..., :: self.every, :: self.every].flatten()
        count = len(next(iter(found.values())))
        if inside is None:
            chosen: Sequence[Tensor] = [picked] * count
        else:
            shares = adaptive_avg_pool2d(inside[:, None], grid).flatten(1)
            chosen = [picked[share[picked] > 0.5] for share in shares]
        columns: Columns = {
            name: [image.flatten(0, -2)[rows] for image, rows in zip(tokens, chosen, strict=True)]
            for name, tokens in found.items()
        }
        return {**columns, PATCHES: [rows.int() for rows in chosen]}


def _begin_to_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU, which a GPU makes while its other work goes on: into memory that stays where it is."""
    if not tensor.is_cuda:
        return tensor.cpu()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
