"""Models that hold a vision backbone: finding it, running the whole on one image, and seeing what depends on what."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.utils import ModelOutput

from ..layout.probing import CALL_ERRORS, Probe, evaluation_mode
from ..runtime.errors import BackboneError, HeadError, first_sentence
from ..runtime.modeling_soap import SOAPModelWrapper
from ..runtime.patch_layout import layer_tokens, replace_layer_tokens
from ..runtime.vision_backbone import CallConvention, is_automodel, is_inside, takes_pixels, vision_towers

Inputs = Tensor | Mapping[str, Any]
"""What a model is called with: a tensor of pixels, or arguments by name."""

Hook = Callable[[nn.Module, Any, Any], Any]


@dataclass
class Host:
    """A model that holds a vision backbone, called on the same image with the same random numbers every time.

    Every call leaves it as it was. The image is noise of `size`, unless there are `inputs`; a model of images and text
    that has `get_image_features` needs none.
    """

    model: nn.Module
    size: tuple[int, int]
    inputs: Inputs | None = None

    @torch.no_grad()
    def run(self, hooks: Mapping[nn.Module, Hook]) -> Any:
        """The model's outputs, with forward hooks on some of its modules."""
        device = next(self.model.parameters()).device
        devices = [] if device.type == "cpu" else [device]
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=devices, device_type=device.type))
            stack.enter_context(evaluation_mode(self.model))
            for module, hook in hooks.items():
                stack.callback(module.register_forward_hook(hook).remove)
            torch.manual_seed(0)
            try:
                return self._call()
            except HeadError:
                raise
            except CALL_ERRORS as error:
                what = "these inputs" if self.inputs is not None else f"one image of {self.size[0]} x {self.size[1]}"
                raise BackboneError(
                    f"{type(self.model).__name__} cannot be called with {what} ({first_sentence(error)}); pass "
                    "inputs=…, a tensor or a dict of arguments that it takes."
                ) from error

    def _call(self) -> Any:
        if isinstance(self.inputs, Mapping):
            return self.model(**self.inputs)
        if self.inputs is not None:
            return self.model(self.inputs)
        model: Any = self.model
        parameter = next(model.parameters())
        channels = getattr(getattr(model, "config", None), "num_channels", 3)
        pixels = torch.randn(1, channels, *self.size).to(parameter.device, parameter.dtype)
        if not hasattr(model, "config"):
            return model(pixels)
        if hasattr(model, "get_image_features") and not takes_pixels(model):
            return model.get_image_features(pixel_values=pixels)
        return model(**CallConvention.of(model).complete(pixels, {}))


def image_size_of(inputs: Inputs | None) -> tuple[int, int] | None:
    """`(height, width)` of the pixels among a model's inputs, if they tell."""
    values = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    maps = [value for value in values if isinstance(value, Tensor) and value.ndim >= 4]
    return (maps[0].shape[-2], maps[0].shape[-1]) if maps else None


def find_towers(model: nn.Module) -> dict[str, nn.Module]:
    """Paths and modules of a model's vision backbones: those of transformers, and timm's final norms; not a head's."""
    for path, module in model.named_modules():
        if isinstance(module, SOAPModelWrapper):
            raise HeadError(
                f"{path or type(module).__name__} is a SOAP head with its backbone, whose tokens are clean already."
            )
    towers: dict[str, nn.Module] = dict(vision_towers(model))
    for path, module in model.named_modules():
        is_timm = hasattr(module, "forward_features") and hasattr(module, "num_prefix_tokens")  # a ViT of timm
        if is_timm and not any(is_inside(path, above) for above in towers):
            towers[f"{path}.norm".lstrip(".")] = module.norm
    return towers


def states_source(backbone: PreTrainedModel, size: tuple[int, int]) -> nn.Module:
    """Whose output a backbone's hidden states are read from: its own, or of the part that it makes feature maps of."""
    if is_automodel(backbone) or not isinstance(backbone, BackboneMixin):
        return backbone
    sources: list[tuple[int, nn.Module]] = []
    with ExitStack() as stack:
        for path, module in backbone.named_modules():

            def note(part: nn.Module, _: Any, outputs: Any, depth: int = path.count(".")) -> None:
                if isinstance(outputs, ModelOutput) and outputs.get("hidden_states"):
                    sources.append((depth, part))

            if path:
                stack.callback(module.register_forward_hook(note).remove)
        Probe(backbone, size, hidden_states=True, spots=False)
    if not sources:
        raise BackboneError(
            f"{type(backbone).__name__} makes its feature maps without hidden states, so none can be cleaned; pass "
            "module=…, the path of a module whose output the model reads."
        )
    return min(sources, key=lambda source: source[0])[1]


def map_tokens(outputs: Any, layer: int, function: Callable[[Tensor], Tensor]) -> Any:
    """A module's outputs with `function` applied to the tensor of `layer`, if they hold it.

    Of a plain tensor or tuple, layer -1 is the tensor or the first of the tuple; other layers are in its first tuple
    of tensors.
    """
    if isinstance(outputs, Tensor):
        return function(outputs)
    if isinstance(outputs, ModelOutput):
        states = outputs.get("hidden_states") or ()
        if layer == -1 or (layer < len(states) and states[layer] is not None):
            replace_layer_tokens(outputs, layer, function(layer_tokens(outputs, layer)))
        return outputs
    if not isinstance(outputs, tuple):
        raise BackboneError(f"A {type(outputs).__name__} holds no patch tokens; choose a module that gives a tensor.")
    if layer == -1:
        return (map_tokens(outputs[0], -1, function), *outputs[1:])
    place = next((place for place, part in enumerate(outputs) if isinstance(part, tuple)), None)
    if place is None or layer >= len(outputs[place]):
        return outputs
    states = outputs[place]
    states = (*states[:layer], function(states[layer]), *states[layer + 1 :])
    return (*outputs[:place], states, *outputs[place + 1 :])


def depends(before: Any, after: Any, own: list[Tensor]) -> bool:
    """Whether two outputs of a model differ in more than the tensors `own` that it merely hands on."""
    kept = {id(tensor) for tensor in own}
    first, second = (list(_tensors(outputs, kept)) for outputs in (before, after))
    pairs = zip(first, second, strict=False)
    return len(first) != len(second) or any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def _tensors(outputs: Any, handed_on: set[int]) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, ModelOutput):  # more than its fields: some models add attributes
        found = _tensors(list(vars(outputs).values()), handed_on)
        yield from (tensor for tensor in found if id(tensor) not in handed_on)
    elif isinstance(outputs, (Mapping, list, tuple)):
        for value in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from _tensors(value, handed_on)
