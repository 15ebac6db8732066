"""A vision backbone, opened once: where it came from, what it takes, and what a probe of it shows."""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..files import missing_path
from ..runtime.errors import BackboneError
from ..runtime.head_files import commit_of
from ..runtime.vision_backbone import bare_backbone, load_backbone, native_image_size
from .detection import PatchLayout
from .plain import PlainBackbone
from .probing import Probe, at_first_size, probe_size, probe_sizes
from .references import BackboneReference
from .tokens import described, open_plain


class OpenedBackbone:
    """A live backbone, that of a task model or a composite model too, and what is known of it; all is asked once.

    It is found again at `name_or_path`, by default where the model says it came from, and there at commit `revision`.
    A module of another library is one too: `tokens` say where its patch tokens are (see `open_plain`), `size` at which
    `(height, width)` to look for them, and `reference` how it was made.
    """

    def __init__(
        self,
        model: nn.Module,
        name_or_path: str | None = None,
        revision: str | None = None,
        *,
        tokens: str | Callable[[Tensor], Any] | None = None,
        size: tuple[int, int] | None = None,
        reference: BackboneReference | None = None,
    ):
        if is_plain(model) or tokens is not None:
            self.model: PreTrainedModel = open_plain(model, tokens, size)
            self.reference: BackboneReference | None = reference or BackboneReference()
            name_or_path = name_or_path or (None if self.reference.kind == "live" else str(self.reference))
        else:
            self.model, self.reference = bare_backbone(model), None
        self.name_or_path = name_or_path or self.model.config.name_or_path or None
        self.revision = revision
        self.is_as_referred = False  # someone may have changed the weights of a live model
        self.checkpoint_dtype: str | None = None  # of a model by name, as its config says
        self._probes: dict[tuple[int, int], Probe] = {}

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike,
        *,
        dtype: str | torch.dtype | None = None,
        device: torch.device | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        tokens: str | Callable[[Tensor], Any] | None = None,
        arguments: dict[str, Any] | None = None,
        size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> "OpenedBackbone":
        """Loads a backbone by hub id, folder or reference, at the commit where its branch stands now.

        `dtype` is the checkpoint's and `device` the CPU unless given; `kwargs` reach `AutoModel.from_pretrained`.
        What [`BackboneReference`] reads is made with `arguments`; its tokens are found as those of a live module.
        """
        if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise BackboneError(f"{dtype!r} is no dtype of torch; give float32, bfloat16 or float16.")
        name = os.fspath(name_or_path)
        if reference := BackboneReference.parse(name, arguments):
            reference, how = reference.pinned(), kwargs.get("trust_remote_code")
            made = reference.make(how).to(device=device, dtype=None if dtype in (None, "auto") else as_dtype(dtype))
            opened = cls(made, tokens=tokens, size=size, reference=reference)
            opened.is_as_referred = True
            return opened
        if problem := missing_path(name, word_is_path=True):
            raise BackboneError(problem)
        name = os.path.abspath(name) if os.path.isdir(name) else name  # the working directory may change
        commit = None if os.path.isdir(name) else commit_of(name, revision, token=token)
        pin = {"revision": commit} if commit else {}
        model = load_backbone(name, dtype=dtype or "auto", token=token, **pin, **kwargs)
        opened = cls(model if device is None else model.to(device), name, commit, tokens=tokens, size=size)
        opened.is_as_referred = True
        said, _ = PretrainedConfig.get_config_dict(
            name, token=token, **pin
        )  # of the one loaded, it is the one asked for
        opened.checkpoint_dtype = said.get("dtype") or said.get("torch_dtype")
        return opened

    @property
    def plain(self) -> dict[str, Any] | None:
        """What a head keeps of a module of another library; `None` of a transformers model."""
        if not isinstance(self.model, PlainBackbone):
            return None
        return {**described(self.model), "reference": (self.reference or BackboneReference()).to_dict()}

    @property
    def native_size(self) -> tuple[int, int] | None:
        """`(height, width)` that it was made for, if it says so."""
        return native_image_size(self.model.config)

    @property
    def num_channels(self) -> int:
        """Channels of the images that it takes."""
        return getattr(self.model.config, "num_channels", None) or 3

    def probe(self, size: tuple[int, int] | None = None, *, hidden_states: bool = False) -> Probe:
        """What it returns for images of noise of a size; default: its native one, else 224 x 224."""
        size = size or probe_size(self.model)
        known = self._probes.get(size)
        if known is None or (hidden_states and not known.hidden_states):
            known = self._probes[size] = Probe(self.model, size, hidden_states)
        return known

    def layouts(
        self,
        layers: Iterable[int],
        size: tuple[int, int] | None = None,
        known: Mapping[int, PatchLayout] | None = None,
    ) -> tuple[dict[int, PatchLayout], dict[int, int]]:
        """Where the patch tokens of some layers lie, unless `known`, and how wide they are.

        Without a `size` a small image is looked at, and one of native size where that does not tell.
        """
        layers, known = list(layers), known or {}
        hidden_states = any(layer >= 0 for layer in layers)

        def look(one: tuple[int, int]) -> tuple[dict[int, PatchLayout], dict[int, int]]:
            probe = self.probe(one, hidden_states=hidden_states)
            find = PatchLayout.from_probe if size is not None else PatchLayout.settled
            found = {layer: known.get(layer) or find(probe, layer) for layer in layers}
            patches = {layer: layout.patches(probe.tokens(layer), probe.size) for layer, layout in found.items()}
            return found, {layer: tokens.shape[-1] for layer, tokens in patches.items()}

        return at_first_size(probe_sizes(self.model) if size is None else [size], look)

    def forget_probes(self) -> None:
        """Frees the tokens of what was probed."""
        self._probes.clear()

    def layout(self, layer: int, size: tuple[int, int] | None = None, *, hidden_states: bool = False) -> PatchLayout:
        """Where the patch tokens of a layer lie."""
        return PatchLayout.from_probe(self.probe(size, hidden_states=hidden_states or layer >= 0), layer)


def is_plain(model: Any) -> bool:
    """Whether a model is a module of another library than transformers; one with adapters to merge is not."""
    known = isinstance(model, PreTrainedModel) or hasattr(model, "merge_and_unload")
    return isinstance(model, nn.Module) and not known


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype of torch by its name."""
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
