"""Tiny random models that hold a vision backbone: task models, models of images and text, plain modules."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    Dinov2Config,
    Dinov2Model,
    DPTConfig,
    DPTForDepthEstimation,
    PreTrainedModel,
    SiglipForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from tests.tiny_backbones import COMPOSITES, DINO, VIT

IDS = torch.tensor([[1, 5, 2]])


class PlainViT(nn.Module):
    """A ViT that is no transformers model; it classifies by the mean of its patch tokens."""

    def __init__(self) -> None:
        super().__init__()
        vit = ViTModel(ViTConfig(**VIT))
        self.embed, self.blocks, self.norm = vit.embeddings, vit.layers, vit.layernorm
        self.classifier = nn.Linear(32, 5)

    def forward_tokens(self, pixels: Tensor) -> Tensor:
        tokens = self.embed(pixels)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.classifier(self.forward_tokens(pixels)[:, 1:].mean(1))


class TimmLikeViT(PlainViT):
    """Stands in for a ViT of timm: the same names, and its final norm last among the features."""

    num_prefix_tokens = 1

    def forward_features(self, pixels: Tensor) -> Tensor:
        return self.forward_tokens(pixels)


@dataclass(frozen=True)
class HostModel:
    """A model, the backbone in it, and where it reads that backbone's tokens.

    Attributes:
        build: makes the model in evaluation mode.
        layers: of a head that it reads.
        reader: path of the module that is given the tokens, once for each layer or all together; `reads_output` says
            that it is the module that makes them.
        read: from the outputs of a wrapper to the tensors that the reader is given.
        backbone: from the model to a transformers model that makes the same tokens.
        module, call: as the user would attach and call it.
        warns: nothing in the model depends on the tokens.
    """

    build: Callable[[], nn.Module]
    layers: tuple[int, ...]
    reader: str
    read: Callable[[Any], list[Tensor]]
    backbone: Callable[[Any], PreTrainedModel]
    module: str = "auto"
    call: Callable[[Any, Tensor], Any] = lambda model, pixels: model(pixels)
    reads_output: bool = False
    warns: bool = False


def _map(tokens: Tensor) -> Tensor:
    """Tokens of a 4 x 4 grid after CLS as a map."""
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))


def _as_vit(plain: PlainViT) -> PreTrainedModel:
    vit = ViTModel(ViTConfig(**VIT))
    vit.embeddings, vit.layers, vit.layernorm = plain.embed, plain.blocks, plain.norm
    return vit.eval()


def _as_dinov2(backbone: Any) -> PreTrainedModel:
    model = Dinov2Model(Dinov2Config(**DINO))
    model.embeddings, model.encoder, model.layernorm = backbone.embeddings, backbone.encoder, backbone.layernorm
    return model.eval()


def _beit() -> nn.Module:
    deep = VIT | {"num_hidden_layers": 4, "use_absolute_position_embeddings": True, "out_indices": [1, 2, 3, 4]}
    return BeitForSemanticSegmentation(BeitConfig(**deep))


def _dpt() -> nn.Module:
    dinov2 = Dinov2Config(**DINO, out_indices=[1, 2], reshape_hidden_states=False)
    neck = {"neck_hidden_sizes": [8, 8], "reassemble_factors": [1, 1], "fusion_hidden_size": 8}
    return DPTForDepthEstimation(DPTConfig(backbone_config=dinov2, is_hybrid=False, **neck))


def _upernet() -> nn.Module:
    dinov2 = Dinov2Config(**DINO, out_indices=[1, 2], apply_layernorm=False)
    return UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=dinov2, hidden_size=8, use_auxiliary_head=False, pool_scales=[1, 2])
    )


def _mae() -> nn.Module:
    decoder = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    decoder = {f"decoder_{name}": value for name, value in decoder.items()}
    return ViTMAEForPreTraining(ViTMAEConfig(**VIT, **decoder, mask_ratio=0.0))


def _raster(model: Any, pixels: Tensor) -> Any:
    return model(pixels, noise=torch.arange(16.0).expand(len(pixels), -1))


HOSTS: dict[str, HostModel] = {
    "ViT classifier": HostModel(
        lambda: ViTForImageClassification(ViTConfig(**VIT)), (-1,), "vit", lambda out: [out.last_hidden_state],
        lambda model: model.vit, reads_output=True, warns=True,
    ),
    "ViT reconstruction": HostModel(
        lambda: ViTForMaskedImageModeling(ViTConfig(**VIT, encoder_stride=8)), (-1,), "decoder",
        lambda out: [_map(out.last_hidden_state)], lambda model: model.vit,
    ),
    "BEiT segmentation": HostModel(
        _beit, (0, 1, 2, 3), "fpn", lambda out: [_map(state) for state in out.hidden_states[:4]],
        lambda model: model.beit,
    ),
    "DPT on DINOv2": HostModel(
        _dpt, (1, 2), "backbone.layernorm", lambda out: list(out.hidden_states[1:]),
        lambda model: _as_dinov2(model.backbone),
    ),
    "UperNet on DINOv2": HostModel(
        _upernet, (1, 2), "decode_head", lambda out: [_map(state) for state in out.hidden_states[1:]],
        lambda model: _as_dinov2(model.backbone),
    ),
    "CLIP": HostModel(
        lambda: COMPOSITES["clip"].build(), (-1,), "vision_model", lambda out: [out.last_hidden_state],
        lambda model: model.vision_model, call=lambda model, pixels: model(IDS, pixels), reads_output=True, warns=True,
    ),
    "SigLIP classifier": HostModel(
        lambda: SiglipForImageClassification(COMPOSITES["siglip"].build().config), (-1,), "classifier",
        lambda out: [out.last_hidden_state.mean(1)], lambda model: model.vision_model,
    ),
    "LLaVA": HostModel(
        lambda: COMPOSITES["llava"].build(), (1,), "multi_modal_projector", lambda out: [out.hidden_states[1][:, 1:]],
        lambda model: model.vision_tower, call=lambda model, pixels: model.get_image_features(pixels),
    ),
    "ViT-MAE pretraining": HostModel(
        _mae, (-1,), "decoder", lambda out: [out.last_hidden_state], lambda model: model.vit, call=_raster
    ),
    "like timm": HostModel(TimmLikeViT, (-1,), "classifier", lambda out: [out.last_hidden_state[:, 1:].mean(1)],
        _as_vit),
    "plain module": HostModel(PlainViT, (-1,), "classifier", lambda out: [out.last_hidden_state[:, 1:].mean(1)],
        _as_vit, module="norm"),
}  # fmt: skip
