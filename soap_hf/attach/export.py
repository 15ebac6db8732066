"""Carrying a head elsewhere: wrapper and projection as ONNX, for any batch and image size."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import staging_folder
from ..heads.model import SOAPModelWrapper
from ..layout.probing import evaluation_mode, probe_size
from ..runtime.errors import BackboneError, HeadError, first_sentence
from ..runtime.patch_layout import layer_tokens
from ..runtime.projection import SOAPProjection

ANY = torch.export.Dim.DYNAMIC
"""A dimension of any length."""


def export_onnx(model: SOAPModelWrapper | SOAPProjection, path: str | os.PathLike) -> None:
    """Writes a wrapper with its backbone, or a projection alone, as ONNX.

    A wrapper takes `pixel_values` `(B, 3, H, W)`, any batch and, where the backbone can, any image size, and gives the
    tokens of each of its layers, patches clean: `last_hidden_state` or `hidden_states.<i>`. A projection takes
    `tokens` `(B, N, D)` and gives `clean_tokens`. Weights of more than 2 GB go into a second file beside `path`.

    Args:
        model ([`SOAPModelWrapper`] or [`SOAPProjection`]): what to export, in the dtype it is in.
        path (`str` or `os.PathLike`): the file to write.

    Raises:
        HeadError: onnx and onnxscript are not installed, or the path does not end in `.onnx`.
        BackboneError: the backbone cannot be exported, or is in another dtype than float32 or float16.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise HeadError(f"An ONNX file ends in .onnx, not {path.name!r}.")
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise HeadError('ONNX export needs onnx and onnxscript: pip install "soap-hf[onnx]".') from error
    floating = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    if unknown := sorted(map(str, floating - {torch.float32, torch.float16})):
        found = " and ".join(unknown).replace("torch.", "")
        raise BackboneError(f"ONNX runtimes take no model in {found}; export model.float(), or model.half().")
    with torch.no_grad(), evaluation_mode(model), _every_patch_kept(model):
        try:
            if isinstance(model, SOAPProjection):
                given, made = "tokens", ["clean_tokens"]
                example = torch.zeros(2, 3, model.dim, device=model.basis.device)
                traced = torch.export.export(model, (example,), dynamic_shapes=({0: ANY, 1: ANY},))
            else:
                traced, given, layers = _trace_wrapper(model), "pixel_values", model.config.layers
                made = ["last_hidden_state" if layer == -1 else f"hidden_states.{layer}" for layer in layers]
            names: Any = {"input_names": [given], "output_names": made}
            program: Any = torch.onnx.export(traced, **names, dynamo=True, verbose=False)
        except (torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.TorchDynamoException, ValueError) as error:
            raise BackboneError(f"{type(model).__name__} cannot be exported ({first_sentence(error)}).") from error
    with staging_folder(path.parent) as folder:
        program.save(str(folder / path.name))


def _trace_wrapper(model: SOAPModelWrapper) -> torch.export.ExportedProgram:
    """A program for any size if the backbone and its trace take others than its own, else for that alone.

    The size to trace at is not the native one, at which positions are not interpolated, and not square, where height
    passes for width.
    """
    height, width = probe_size(model.backbone)
    step = model.layouts[model.config.layers[-1]].stride or 32

    def pixels(height: int, width: int) -> Tensor:
        return torch.zeros(2, 3, height, width, device=model.device, dtype=model.dtype)

    def trace(example: Tensor, *free: int) -> torch.export.ExportedProgram:
        shapes = (dict.fromkeys(free, ANY),)
        return torch.export.export(_Tokens(model), (example,), dynamic_shapes=shapes, strict=True)

    try:
        model(pixels(height - step, width + step))
    except (ValueError, RuntimeError, AssertionError):
        return trace(pixels(height, width), 0)
    program = trace(pixels(height - step, width + step), 0, 2, 3)
    try:
        program.module()(pixels(height + 2 * step, width - step))  # a size fixed in the trace shows here
    except AssertionError as error:
        raise BackboneError(
            f"The trace of {type(model.backbone).__name__} holds for one image size alone ({first_sentence(error)})."
        ) from error
    return program


class _Tokens(nn.Module):
    """A wrapper that returns plain tensors: the clean tokens of each layer."""

    def __init__(self, model: SOAPModelWrapper):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        outputs = SOAPModelWrapper.forward(self.model, pixel_values)
        return tuple(layer_tokens(outputs, layer) for layer in self.model.config.layers)


@contextlib.contextmanager
def _every_patch_kept(model: nn.Module) -> Iterator[None]:
    """Within the block a ViTMAE skips its masking of none, which would fix the number of patches in the trace."""
    embeddings: Any = getattr(getattr(model, "backbone", None), "embeddings", None)
    if not hasattr(embeddings, "random_masking"):
        yield
        return
    embeddings.random_masking = _keep_all
    try:
        yield
    finally:
        del embeddings.random_masking


def _keep_all(sequence: Tensor, noise: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """What ViTMAE's random masking gives if nothing is masked."""
    mask = torch.zeros(sequence.shape[:2], device=sequence.device)
    order = torch.arange(sequence.shape[1], device=sequence.device).expand(sequence.shape[0], -1)
    return sequence, mask, order
