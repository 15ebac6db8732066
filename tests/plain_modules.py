"""Tiny modules in the styles of other libraries: what they return, and how; none of them is a transformers model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

WIDTH, DEPTH, PATCH, SIZE = 32, 2, 8, 32


class Block(nn.Module):
    """Attention and MLP, with positions of rotary angles if there are any."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(dropout), nn.Linear(WIDTH, WIDTH))

    def forward(self, tokens: Tensor, angles: Tensor | None = None) -> Tensor:
        query, key, value = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self._qkv(tokens))
        if angles is not None:
            query, key = _turned(query, angles), _turned(key, angles)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.proj(mixed.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm2(tokens))

    def _qkv(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(self.norm1(tokens)).chunk(3, dim=-1)


def _turned(part: Tensor, angles: Tensor) -> Tensor:
    first, second = part.chunk(2, dim=-1)
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1)


class TimmStyle(nn.Module):
    """As timm's VisionTransformer: `forward_features` gives all tokens, `forward` classes; with its settings."""

    num_prefix_tokens = 1

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH) / 10)
        self.pos_embed = nn.Parameter(torch.randn(1, 17, WIDTH) / 10)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(dropout) for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)
        self.pretrained_cfg = {
            "input_size": (3, SIZE, SIZE),
            "mean": (0.5, 0.4, 0.3),
            "std": (0.25, 0.2, 0.1),
            "interpolation": "bilinear",
            "crop_pct": 0.8,
        }

    def forward_features(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x).flatten(2).mT
        tokens = torch.cat((self.cls_token.expand(len(x), -1, -1), patches), dim=1) + self.pos_embed
        return self.norm(self.blocks(self.drop(tokens)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x)[:, 0])


class TorchvisionEncoder(nn.Module):
    """The encoder of torchvision's VisionTransformer."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.randn(1, 17, WIDTH) / 10)
        self.layers, self.ln = nn.Sequential(*(Block() for _ in range(DEPTH))), nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.ln(self.layers(tokens + self.pos_embedding))


class TorchvisionStyle(nn.Module):
    """As torchvision's VisionTransformer: `forward` gives classes, and nothing gives tokens but its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size, self.patch_size = SIZE, PATCH
        self.conv_proj = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH) / 10)
        self.encoder, self.heads = TorchvisionEncoder(), nn.Linear(WIDTH, 5)

    def _process_input(self, x: Tensor) -> Tensor:
        return self.conv_proj(x).flatten(2).mT

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat((self.class_token.expand(len(x), -1, -1), self._process_input(x)), dim=1)
        return self.heads(self.encoder(tokens)[:, 0])


class RotaryViT(nn.Module):
    """A hand-written ViT: no CLS token, four registers, rotary positions of rows and columns; any size."""

    registers_count = 4

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.storage = nn.Parameter(torch.randn(1, self.registers_count, WIDTH) / 10)
        self.layers, self.last = nn.ModuleList(Block() for _ in range(DEPTH)), nn.LayerNorm(WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.embed(pixels)
        rows, columns = maps.shape[-2:]
        tokens = torch.cat((self.storage.expand(len(pixels), -1, -1), maps.flatten(2).mT), dim=1)
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(pixels)
        angles = torch.cat((torch.zeros(self.registers_count, 2).to(pixels), places)).repeat_interleave(4, dim=1)
        for layer in self.layers:
            tokens = layer(tokens, angles / 2)
        return self.last(tokens)


class DinoV2Style(RotaryViT):
    """As DINOv2 and DINOv3 of torch.hub: `forward_features` gives a dict of tokens apart, `forward` the CLS token."""

    def forward_features(self, x: Tensor, masks: Any = None) -> dict[str, Any]:
        tokens = RotaryViT.forward(self, x)
        return {
            "x_norm_clstoken": tokens[:, 0],
            "x_norm_regtokens": tokens[:, 1:4],
            "x_norm_patchtokens": tokens[:, 4:],
            "x_prenorm": tokens + 1,
            "masks": masks,
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x)["x_norm_clstoken"]


class CapiStyle(RotaryViT):
    """As CAPI of torch.hub: `forward` gives CLS, registers and a map; `forward_features` needs more than pixels."""

    def forward_features(self, x: Tensor, visible_indices: Any, enc_layer: int) -> tuple[Tensor, None]:
        return RotaryViT.forward(self, x), None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, _ = self.forward_features(x, None, DEPTH)
        rows, columns = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        return tokens[:, 0], tokens[:, :4], tokens[:, 4:].unflatten(1, (rows, columns))


class MapStyle(nn.Module):
    """Its tokens are a map `(B, D, H, W)`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.mix(self.stem(pixels).tanh())


class PlainMAE(nn.Module):
    """A ViT-MAE of transformers taken apart: its modules called by hand, with every patch."""

    def __init__(self, folder: Any) -> None:
        super().__init__()
        model = AutoModel.from_pretrained(folder, mask_ratio=0.0, dtype=torch.float32)
        self.patch_size, self.image_size = model.config.patch_size, model.config.image_size
        embeddings = model.embeddings
        self.projection, self.cls_token = embeddings.patch_embeddings.projection, embeddings.cls_token
        self.positions = embeddings.position_embeddings
        self.blocks, self.norm = getattr(model, "layers", None) or model.encoder.layer, model.layernorm

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.projection(pixels).flatten(2).mT + self.positions[:, 1:]
        cls = self.cls_token + self.positions[:, :1]
        tokens = torch.cat((cls.expand(len(pixels), -1, -1), tokens), dim=1)
        for block in self.blocks:
            found = block(tokens)
            tokens = found[0] if isinstance(found, tuple) else found
        return self.norm(tokens)


@dataclass(frozen=True)
class PlainStyle:
    """A style, where its tokens are found without help, and how they lie."""

    build: Callable[[], nn.Module]
    source: str
    prefix: int = 0
    order: str = "tokens"
    sizes: str = "native only"


STYLES = {
    "timm's VisionTransformer": PlainStyle(TimmStyle, "forward_features", prefix=1),
    "torchvision's VisionTransformer": PlainStyle(TorchvisionStyle, "encoder", prefix=1),
    "DINOv2's dict": PlainStyle(DinoV2Style, "forward_features:x_norm_patchtokens", sizes="any"),
    "CAPI's tuple": PlainStyle(CapiStyle, ":2", order="channels_last", sizes="any"),
    "rotary positions and registers": PlainStyle(RotaryViT, "", prefix=4, sizes="any"),
    "a map": PlainStyle(MapStyle, "", order="channels_first", sizes="any"),
}


def build(name: str) -> nn.Module:
    """A module of a style in evaluation mode, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return STYLES[name].build().eval()
