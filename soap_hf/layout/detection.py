"""Finding the layout of a backbone's patch tokens: what the model declares, confirmed by a probe."""

from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedModel

from ..runtime import patch_layout
from ..runtime.errors import LayoutError
from ..runtime.patch_layout import MAPS, Order, as_size
from . import evidence
from .plain import PlainBackbone, name_of
from .probing import Probe, at_first_size, probe_size, probe_sizes

SPOTS_NEEDED = 2
"""Spots of a probe that must move their own patch: one alone may lie on the diagonal of a transposed grid."""


@dataclass(frozen=True)
class PatchLayout(patch_layout.PatchLayout):
    """Where the patch tokens lie in the tensor that a backbone returns.

    Attributes:
        order (`str`, defaults to `"tokens"`): `"tokens"` for (B, N, D) in raster order; `"frames_rows_columns"` and
            `"rows_columns_frames"` for (B, N, D) of clips; `"packed"` for (1, sum N, D), image after image;
            `"channels_first"` for (B, D, H, W); `"channels_last"` for (B, H, W, D).
        prefix (`int`, defaults to 0): tokens before the patches (CLS, registers).
        suffix (`int`, defaults to 0): tokens after them (detection tokens).
        stride (`int`, *optional*): pixels from one patch to the next; needed to lay (B, N, D) tokens out on their
            grid.

    Raises:
        LayoutError: an unknown order, or a count that is none.

    Example:
        >>> import torch
        >>> layout = PatchLayout(prefix=1, stride=16)
        >>> layout.patches(torch.zeros(2, 1 + 14 * 28, 8), image_size=(224, 448)).shape
        torch.Size([2, 14, 28, 8])
    """

    @classmethod
    def detect(
        cls,
        model: PreTrainedModel,
        *,
        image_size: int | tuple[int, int] | None = None,
        layer: int = -1,
        **overrides: Any,
    ) -> "PatchLayout":
        """Finds the layout from what the model declares, confirmed by one forward pass over five images of noise.

        Args:
            model (`PreTrainedModel`): a vision backbone; it is left as it was.
            image_size (`int` or `(height, width)`, *optional*): default: 8 x 8 patches, or where the model takes none
                of those or the layout does not show at them, the size in its config, else 224.
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
        size = as_size(image_size)
        if size is not None:
            return cls.from_probe(Probe(model, size, layer >= 0), layer, **overrides)
        sizes = probe_sizes(model)
        return at_first_size(sizes, lambda one: cls.settled(Probe(model, one, layer >= 0), layer, **overrides))

    @classmethod
    def settled(cls, probe: Probe, layer: int = -1, **overrides: Any) -> "PatchLayout":
        """As `from_probe`, but refuses what a small image leaves open: maps, and strides that the config names not."""
        layout, declared = cls.from_probe(probe, layer, **overrides), evidence.declared_strides(probe.model.config)
        if probe.size != probe_size(probe.model) and layout.stride not in declared:
            raise LayoutError(f"An image of {probe.size[0]} x {probe.size[1]} pixels does not tell whether {layout}.")
        return layout

    @classmethod
    def from_probe(cls, probe: Probe, layer: int = -1, **overrides: Any) -> "PatchLayout":
        """Finds the layout from one probe of a model; see `detect`."""
        unknown = set(overrides) - {field.name for field in fields(cls)}
        if unknown:
            raise LayoutError(f"A patch layout has no field {', '.join(sorted(unknown))}.")
        model, tokens = probe.model, probe.tokens(layer)
        order = overrides.get("order") or evidence.declared_order(probe, tokens)
        if order in MAPS:
            return cls(**{"order": order, **overrides})
        num_tokens = tokens.shape[1] // probe.num_images if order == "packed" else tokens.shape[1]
        prefix, suffix = evidence.declared_extra_tokens(model, num_tokens, probe.size)
        declared: dict[str, Any] = {"order": order, "prefix": prefix, "suffix": suffix} | overrides
        num_patches = num_tokens - declared["prefix"] - declared["suffix"]
        frames = evidence.declared_frames(model.config, probe.num_frames)
        if declared.get("stride") is None and num_patches % frames == 0:
            declared["stride"] = evidence.find_stride(num_patches // frames, probe.size, model.config)
        if declared.get("stride") is not None:
            layout = cls(**declared)
            try:
                if not overrides:
                    layout._confirm(probe, layer, num_patches)
            except LayoutError:
                # of a module that declares nothing, the count was a guess
                guessed = isinstance(model, PlainBackbone) and cls._from_moves(probe, layer, order, num_tokens, frames)
                if not guessed:
                    raise
                return guessed
            return layout
        probed = None if overrides else cls._from_moves(probe, layer, order, num_tokens, frames)
        if probed is None:
            raise LayoutError(
                f"{name_of(model)} returns {num_tokens} tokens for an image of {probe.size[0]} x "
                f"{probe.size[1]} pixels; without {declared['prefix']} before and {declared['suffix']} after them, "
                f"{num_patches} patches form no grid: pass a PatchLayout(prefix=…, suffix=…, stride=…)."
            )
        return probed

    @classmethod
    def _from_moves(cls, probe: Probe, layer: int, order: Order, num_tokens: int, frames: int) -> "PatchLayout | None":
        """The only layout under which each spot moves its own patch: of the config's patch size, else of another."""
        moves = probe.moves(layer)
        if not evidence.is_clear(moves):
            return None
        declared = evidence.declared_strides(probe.model.config)
        for strides in (declared, evidence.possible_strides(num_tokens, frames, probe.size)):
            found = []
            for stride in strides:
                grid = frames, probe.size[0] // stride, probe.size[1] // stride
                num_patches = grid[0] * grid[1] * grid[2]
                for prefix in evidence.probed_prefixes(moves, evidence.spot_places(probe, order, grid, stride)):
                    suffix = num_tokens - prefix - num_patches
                    if prefix >= 0 and suffix >= 0 and num_patches > 1:
                        found.append(cls(order=order, prefix=prefix, suffix=suffix, stride=stride))
            if len(found) == 1:
                return found[0]
        return None

    def _confirm(self, probe: Probe, layer: int, num_patches: int) -> None:
        """Refuses the layout if the tokens that move are clearly not those that it says; the error prints both."""
        moves, stride = probe.moves(layer), self.stride or 1
        *frames, rows, columns = self.grid(probe.size, num_patches)
        places = evidence.spot_places(probe, self.order, (frames[0] if frames else 1, rows, columns), stride)
        # among patches alone: a CLS or register token with massive activations may move further than all
        if evidence.spots_seen(moves[:, self.prefix : self.prefix + num_patches], places) >= SPOTS_NEEDED:
            return
        # moves that are not clear refute nothing, but a stride that nobody named needs their support
        if not evidence.is_clear(moves) and stride in evidence.declared_strides(probe.model.config):
            return
        found = evidence.probed_prefixes(moves, places)
        hint = f"with {min(found)} tokens before the patches" if found else "in no raster order"
        raise LayoutError(
            f"{name_of(probe.model)}'s parameters say {self}, but changing spots of an image moves tokens as if "
            f"they lay {hint} (layer {layer}): choose another layer, or pass a PatchLayout to say which holds."
        )
