"""Checkpoints of iBOT and DINO as folders of transformers: a `ViTModel` and its image processor."""

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil, ViTConfig, ViTModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.utils import logging

from .files import staging_folder
from .runtime.errors import BackboneError, first_sentence
from .runtime.head_files import read_tensors

logger = logging.get_logger(__name__)

PREFIXES = ("module.", "backbone.")
"""What wrappers for several GPUs and several crops put before the names of weights."""

NOT_OF_THE_BACKBONE = ("head.", "masked_embed")
"""The projection head, and iBOT's token in place of masked patches: neither makes patch tokens."""

WIDTH_OF_A_HEAD = 64
"""Of attention, in every architecture that iBOT and DINO have published."""

NAMES = {
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
}
"""What the parts of a block are called in checkpoints of transformers' ViT."""


def convert_vit(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    weights: str = "teacher",
    num_heads: int | None = None,
) -> ViTModel:
    """Writes a ViT of iBOT or DINO, whose checkpoints have the same shape, as a folder that `AutoModel` loads.

    The checkpoint is read without running code that may be in it. The image processor is that of their evaluations:
    the shorter side to 8 / 7 of the size, a crop about the centre, ImageNet mean and std.

    Args:
        checkpoint (`str` or `os.PathLike`): a file of torch or safetensors: of a training, with `teacher` and
            `student`; with a `state_dict`; or the weights themselves. The prefixes `module.` and `backbone.` may be
            there.
        output (`str` or `os.PathLike`): the folder.
        weights (`str`, defaults to `"teacher"`): which of a training's, `"teacher"` or `"student"`.
        num_heads (`int`, *optional*): of attention; default: one for each 64 of the width.

    Returns:
        `ViTModel` without a pooler, in evaluation mode, float32.

    Raises:
        BackboneError: the file cannot be read safely, or holds no such ViT; names missing and unexpected weights.
    """
    tensors = _of_the_backbone(_read(Path(checkpoint), weights))
    config = _config(tensors, num_heads)
    model, info = ViTModel.from_pretrained(
        None, config=config, state_dict=_renamed(tensors), output_loading_info=True, add_pooling_layer=False
    )
    wrong = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        told = ", ".join(f"{name.replace('_', ' ')}: {', '.join(keys[:5])}" for name, keys in wrong.items() if keys)
        raise BackboneError(f"{checkpoint} holds no ViT of iBOT or DINO ({told}).")
    size = int(config.image_size)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size * 8 // 7},
        crop_size={"height": size, "width": size},
        resample=PILImageResampling.BICUBIC,
        image_mean=list(IMAGENET_DEFAULT_MEAN),
        image_std=list(IMAGENET_DEFAULT_STD),
    )
    with staging_folder(Path(output)) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return model.eval()


def _read(path: Path, weights: str) -> dict[str, Tensor]:
    """The weights in a file, by the names they have there."""
    if not path.is_file():
        raise BackboneError(f"There is no checkpoint {path}.")
    if path.suffix == ".safetensors":
        return read_tensors(path, None, what="checkpoint", trusted=True)[0]
    try:
        # options of a training may lie beside the weights; they are plain values
        with torch.serialization.safe_globals([argparse.Namespace]):
            held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is none leads to
        raise BackboneError(
            f"{path} cannot be read as weights alone ({first_sentence(error)}); save its state_dict by itself, or as "
            "safetensors."
        ) from error
    if isinstance(held, dict) and {"teacher", "student"} & set(held):
        if weights not in held:
            raise BackboneError(f"{path} holds no {weights} weights; choose another kind.")
        held = held[weights]
    held = held.get("state_dict", held) if isinstance(held, dict) else held
    if not isinstance(held, dict) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise BackboneError(f"{path} holds no weights by name, nor a teacher and a student.")
    return {str(name): value for name, value in held.items()}


def _of_the_backbone(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the backbone, without prefixes and without what makes no patch tokens."""
    tensors = {}
    for name, tensor in found.items():
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        if not name.startswith(NOT_OF_THE_BACKBONE):
            tensors[name] = tensor.float()
    return tensors


def _config(tensors: dict[str, Tensor], num_heads: int | None) -> ViTConfig:
    """The architecture that the shapes of the weights tell."""
    needed = (
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.attn.qkv.weight",
    )
    if missing := [name for name in needed if name not in tensors]:
        some = ", ".join(list(tensors)[:3]) or "nothing"
        raise BackboneError(f"This is no ViT of iBOT or DINO: {missing[0]} is missing among its weights ({some}, …).")
    width, patch = tensors["cls_token"].shape[-1], tensors["patch_embed.proj.weight"].shape[-1]
    side = math.isqrt(tensors["pos_embed"].shape[1] - 1)
    if side * side != tensors["pos_embed"].shape[1] - 1:
        raise BackboneError(
            "The positions of this checkpoint are of no square image, so it is no ViT of iBOT or DINO."
        )
    heads = num_heads or width // WIDTH_OF_A_HEAD
    if heads < 1 or width % heads:
        raise BackboneError(f"A width of {width} has no {heads} heads of attention; pass num_heads (--num-heads).")
    return ViTConfig(
        hidden_size=width,
        num_hidden_layers=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        num_attention_heads=heads,
        intermediate_size=tensors["blocks.0.mlp.fc1.weight"].shape[0],
        layer_norm_eps=1e-6,
        image_size=side * patch,
        patch_size=patch,
        num_channels=tensors["patch_embed.proj.weight"].shape[1],
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
    )


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by the names that they have in checkpoints of transformers' ViT."""
    renamed = {}
    outside = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[0] != "blocks":
            renamed[outside.get(name, name)] = tensor
            continue
        start, inside, kind = f"encoder.layer.{parts[1]}", ".".join(parts[2:-1]), parts[-1]
        if inside == "attn.qkv":
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"{start}.attention.attention.{part}.{kind}"] = rows.clone()
        else:
            renamed[f"{start}.{NAMES.get(inside, inside)}.{kind}"] = tensor
    return renamed
