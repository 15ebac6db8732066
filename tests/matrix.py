"""Every vision type of transformers under a head: what works, measured on tiny random models.

    python -m tests.matrix

writes model_cards/SUPPORTED.md. The tests check each of its lines against the same measurement.
"""

import inspect
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from soap_hf import PatchLayout, SOAPModelWrapper
from soap_hf.layout.backbone import OpenedBackbone
from soap_hf.layout.probing import Probe
from soap_hf.runtime.errors import SOAPError
from soap_hf.runtime.patch_layout import layer_tokens
from tests import plain_modules
from tests.conftest import random_projection
from tests.tiny_backbones import COMPOSITES, TINY_BACKBONES, TinyBackbone

TABLE = Path(__file__).parents[1] / "model_cards" / "SUPPORTED.md"

HEADER = """# Supported backbones

Measured by `python -m tests.matrix` on tiny random models of transformers {version}; the tests check every line, and
that a head on each of them comes back bit for bit in another process, changes the patch tokens alone, and changes them
as the dense projector would.

- *Tokens*: the tensor that the backbone returns, and how many of its tokens are no patches.
- *Sizes*: whether images of other sizes than the native one work: larger, not square, not a multiple of the patch.
- *Layers*: which hidden states can be cleaned beside `last_hidden_state`.
- *Compiles*: with `torch.compile(fullgraph=True)`.

| type | tokens | sizes | layers | compiles |
|---|---|---|---|---|
"""

FOOTER = """
## Vision towers

Of these composite models the vision tower is taken, by name or live, and loaded whole or not at all:
{composites}.

## Modules of other libraries

Small random modules in the styles of other libraries (`tests/plain_modules.py`), measured likewise; the tests fit,
save, load and attach a head on each. *Found at* is where their tokens are found without being told.

| style | found at | tokens | sizes | layers |
|---|---|---|---|---|
{plain}

Eight models of timm {timm} and two of torchvision {torchvision} with random weights go through the same, live,
by `python -m tests.timm_matrix`, which is not part of the tests: vit_tiny_patch16_224,
vit_small_patch14_reg4_dinov2, deit_tiny_distilled_patch16_224, swin_tiny_patch4_window7_224, convnext_atto, resnet18,
hiera_tiny_224, vit_base_patch16_rope_reg1_gap_256; vit_b_16, vit_b_32. Their tokens are found, and a head comes back
bit for bit. Pixels made by timm's settings are those of timm's own transform, up to one pixel where the margin of the
crop is odd (resnet18). Torch.hub's own DINOv2, DINOv3 and CAPI were not at hand.

## Not in the table

- dinat: not run, since it needs natten.
- timm models (`TimmWrapperModel`): seven run, saved and loaded bit for bit with timm 1.0.31 by
  `python -m tests.timm_matrix`, which is not part of the tests. `TimmBackbone` and gemma3n_vision: not run.
- groupvit: its tokens are groups, not patches; xclip: its frames talk to each other through a token of their own.
- Backbones that take packed patches with inputs of their own are refused by name: {packed}.
- Quantised backbones: a tiny ViT was run by hand on CPU in int8 with torchao 0.18.0 and bitsandbytes 0.50.2
  (`AutoModel.from_pretrained(head, quantization_config=…)`): the clean tokens are exactly the head's projection of
  that backbone's raw tokens. Not part of the tests.
"""

ORDER_WORDS = {
    "tokens": "(B, N, D)",
    "frames_rows_columns": "(B, N, D), clip, frame by frame",
    "rows_columns_frames": "(B, N, D), clip, place by place",
    "packed": "(1, sum N, D), packed",
    "channels_first": "(B, D, H, W)",
    "channels_last": "(B, H, W, D)",
}


@dataclass(frozen=True)
class Row:
    """One type's line of the table."""

    model_type: str
    tokens: str
    sizes: str
    layers: str
    compiles: str

    def line(self) -> str:
        """The line as Markdown."""
        return f"| {self.model_type} | {self.tokens} | {self.sizes} | {self.layers} | {self.compiles} |"


def measure(model_type: str) -> Row:
    """Runs one type and says what works."""
    tiny = TINY_BACKBONES[model_type]
    model = tiny.build()
    layout = PatchLayout.detect(model, image_size=tiny.size)
    return Row(model_type, token_words(layout), sizes(model, tiny), layers(model, tiny), compiles(model, tiny))


def token_words(layout: PatchLayout) -> str:
    """What the backbone returns."""
    extra = [f"{layout.prefix} first"] * bool(layout.prefix) + [f"{layout.suffix} last"] * bool(layout.suffix)
    return ORDER_WORDS[layout.order] + (f", {' and '.join(extra)}" if extra else "")


def sizes(model: PreTrainedModel, tiny: TinyBackbone) -> str:
    """Which image sizes the wrapped model takes and lays out."""
    wrapper = SOAPModelWrapper.from_backbone(model, None, image_size=tiny.size)
    height, width = tiny.size
    trials = {"larger": (2 * height, 2 * width), "not square": (height, 2 * width), "ragged": (height + 3, width + 5)}
    works = [name for name, size in trials.items() if lays_out(wrapper, size)]
    if works == list(trials):
        return "any"
    return "multiples of the patch" if works == ["larger", "not square"] else "native only"


def lays_out(wrapper: SOAPModelWrapper, size: tuple[int, int]) -> bool:
    """Whether patch tokens of an image of this size come out on a grid."""
    try:
        with torch.no_grad():
            wrapper.patch_tokens(torch.randn(1, 3, *size))
    except (SOAPError, ValueError, RuntimeError, AssertionError, IndexError):
        return False
    return True


def layers(model: PreTrainedModel, tiny: TinyBackbone) -> str:
    """Which hidden states can be cleaned."""
    probe = Probe(model, tiny.size, hidden_states=True)
    number = len(getattr(probe.outputs, "hidden_states", None) or ())
    found = [layer for layer in range(number) if is_found(probe, layer)]
    if len(found) == number:
        return "all" if number else "none"
    return ", ".join(map(str, found)) or "none"


def is_found(probe: Probe, layer: int) -> bool:
    """Whether the patch tokens of a layer are found."""
    try:
        PatchLayout.from_probe(probe, layer)
    except SOAPError:
        return False
    return True


def compiles(model: PreTrainedModel, tiny: TinyBackbone) -> str:
    """Whether the wrapped model compiles in one graph, and if not, whether the bare one does."""
    layout = PatchLayout.detect(model, image_size=tiny.size)
    wrapper = SOAPModelWrapper.from_backbone(model, None, image_size=tiny.size)
    dim, pixels = wrapper.config.hidden_size, torch.randn(2, 3, *tiny.size)
    wrapper = SOAPModelWrapper.from_backbone(model, random_projection(dim), layout=layout, image_size=tiny.size)
    if is_compiled(wrapper, {"pixel_values": pixels}):
        return "yes"
    with torch.no_grad():
        arguments = wrapper.convention.complete(pixels, {})
    return "BARE ONLY" if is_compiled(wrapper.backbone, arguments) else "the backbone does not"


def is_compiled(model: torch.nn.Module, arguments: dict[str, torch.Tensor]) -> bool:
    """Whether a model compiles with fullgraph=True and gives the same output."""
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True, backend="eager")(**arguments)
            expected = model(**arguments)
    except Exception:  # dynamo raises what it likes
        return False
    return torch.allclose(layer_tokens(compiled, -1), layer_tokens(expected, -1), atol=1e-5)


def measure_plain(name: str) -> str:
    """Runs a module of a style of another library and gives its line of the table."""
    module, size = plain_modules.build(name), (plain_modules.SIZE, plain_modules.SIZE)
    opened = OpenedBackbone(module, size=size)
    layout, found = opened.layout(-1, size), str(opened.model.tokens)
    wrapper = SOAPModelWrapper.from_backbone(module, None, image_size=size)
    trials = {"larger": (64, 64), "not square": (32, 64), "ragged": (35, 37)}
    works = [trial for trial, other in trials.items() if lays_out(wrapper, other)]
    taken = "any" if works == list(trials) else "multiples of the patch" if len(works) == 2 else "native only"
    return f"| {name} | {f'`{found}`' if found else 'its output'} | {token_words(layout)} | {taken} | by path |"


def packed_types() -> list[str]:
    """Vision types whose forward needs more than pixels, and that no tiny backbone stands for."""
    found = set()
    for model_type in MODEL_MAPPING_NAMES:
        if "vision" not in model_type or model_type in TINY_BACKBONES:
            continue
        model = MODEL_MAPPING[CONFIG_MAPPING[model_type]]
        arguments = inspect.signature((model[0] if isinstance(model, tuple) else model).forward).parameters
        if {"grid_thw", "image_grid_thw", "pixel_position_ids", "target_sizes"} & set(arguments):
            found.add(model_type)
    return sorted(found)


def table() -> str:
    """The whole page."""
    rows = "\n".join(measure(name).line() for name in TINY_BACKBONES)
    below = footer(", ".join(COMPOSITES), ", ".join(packed_types()))
    return HEADER.format(version=transformers.__version__) + rows + "\n" + below


def footer(composites: str, packed: str) -> str:
    """What stands below the table of types."""
    plain = "\n".join(measure_plain(name) for name in plain_modules.STYLES)
    return FOOTER.format(composites=composites, packed=packed, plain=plain, timm="1.0.31", torchvision="0.28.0")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(), encoding="utf-8")
    print(f"Written to {TABLE}")
