"""Tiny random models: one for every vision type of transformers, and composite models that hold a vision tower."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, PreTrainedModel

PLACES = ("position", "pos_embed", "rel_pos", "cls_token", "class_embedding", "distillation_token", "register",
          "mask_token", "detection_tokens", "time_embeddings")  # fmt: skip
SCALES = ("lambda", "layer_scale", "layerscale", "gamma")


@dataclass(frozen=True)
class TinyBackbone:
    """A vision type of transformers, small enough to run in a moment."""

    config_class: str  # name in transformers
    config: dict[str, Any]
    size: tuple[int, int]  # (height, width) of the native image
    grid: tuple[int, ...]  # (rows, columns), or (frames, rows, columns) for clips
    prefix: int = 0
    suffix: int = 0
    order: str = "tokens"  # or "channels_first", "channels_last", "packed", "time_last" (place by place)
    frames: int | None = None  # of a clip (B, frames, C, H, W)
    other_size: tuple[int, int] | None = None  # another size it takes, with interpolate_pos_encoding where it exists
    other_grid: tuple[int, ...] | None = None
    output: str = "last_hidden_state"  # the field of the outputs that holds the tokens

    def build(self) -> PreTrainedModel:
        """The model in evaluation mode, the same at every call."""
        return build(self.config_class, self.config, self.size)


@dataclass(frozen=True)
class TinyComposite:
    """A model of images and text with a vision tower inside."""

    config_class: str
    config: dict[str, Any]
    tower: str  # path of the tower's module in the full model
    tower_type: str  # model_type of the tower's config
    prefix: int = 0
    size: tuple[int, int] = (32, 32)
    grid: tuple[int, int] = (4, 4)
    order: str = "tokens"
    tower_config: str = "vision_config"  # name of the tower's config in the full one
    exact: bool = False  # AutoModel.from_pretrained(folder of the full model, config=its tower's config) loads it all
    known: bool = False  # AutoModel knows the tower: tower.save_pretrained, then AutoModel.from_pretrained

    def build(self) -> PreTrainedModel:
        """The full model in evaluation mode, the same at every call."""
        return build(self.config_class, self.config, self.size, self.tower)


@torch.no_grad()
def build(config_class: str, config: dict[str, Any], size: tuple[int, int], tower: str = "") -> PreTrainedModel:
    """A seeded random model whose places differ and whose blocks do something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModel.from_config(getattr(transformers, config_class)(**copy.deepcopy(config)))
        for name, parameter in model.named_parameters():
            if any(part in name for part in PLACES) and (parameter == parameter.flatten()[0]).all():
                nn.init.normal_(parameter, std=0.1)
            elif any(part in name for part in SCALES) and parameter.abs().max() < 0.2:
                nn.init.ones_(parameter)
            elif name.endswith("attention_biases"):
                parameter[:, 0] = 30.0  # LeViT: a place attends to itself
        encoder = model.get_submodule(tower)
        norms = [module for module in encoder.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
        for norm in norms:  # untrained statistics would let the signal fade from layer to layer
            norm.reset_parameters()
            norm.momentum = 1.0
        if norms:
            encoder.train()(pixel_values=torch.randn(4, 3, *size))
    return model.eval()


DEPTH = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
MLP = DEPTH | {"intermediate_size": 32}
VIT = MLP | {"image_size": 32, "patch_size": 8}
DINO = DEPTH | {"mlp_ratio": 1, "image_size": 32, "patch_size": 8}
SMALL = {"size": (32, 32), "grid": (4, 4), "other_size": (24, 40), "other_grid": (3, 5)}
FIXED = {"size": (32, 32), "grid": (4, 4)}
MEDIUM = {"size": (64, 64), "grid": (4, 4), "other_size": (48, 80), "other_grid": (3, 5)}
LARGE = {"size": (128, 128), "grid": (4, 4), "other_size": (96, 160), "other_grid": (3, 5)}
MAPS = LARGE | {"order": "channels_first"}
STAGES = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 8, 16, 32)}
PYRAMID = STAGES | {"num_attention_heads": (1, 1, 2, 2), "mlp_ratios": (1, 1, 1, 1)}
SWIN = {"image_size": 64, "embed_dim": 8, "depths": (1, 1, 1), "num_heads": (1, 2, 2), "window_size": 2}
HIERA_DET = {"hidden_size": 4, "image_size": [128, 128], "blocks_per_stage": [1, 1, 2, 1],
             "embed_dim_per_stage": [4, 8, 16, 32], "num_attention_heads_per_stage": [1, 1, 2, 2],
             "window_size_per_stage": [8, 4, 4, 2], "global_attention_blocks": [3],
             "window_positional_embedding_background_size": [4, 4]}  # fmt: skip
SIGLIP2 = MLP | {"patch_size": 8, "num_patches": 16}
SAM = VIT | {"output_channels": 16, "mlp_dim": 32, "window_size": 2, "global_attn_indexes": (1,),
             "initializer_range": 0.02}  # fmt: skip
SAM3 = VIT | {"pretrain_image_size": 32, "window_size": 2, "global_attn_indexes": [1]}
EFFICIENT = {"image_size": 128, "width_coefficient": 0.025, "depth_coefficient": 0.1, "hidden_dim": 32,
             "kernel_sizes": (3, 3, 3, 3), "in_channels": (32, 16, 24, 40), "out_channels": (16, 24, 40, 320),
             "strides": (2, 2, 2, 2), "num_block_repeats": (1, 1, 1, 1), "expand_ratios": (1, 2, 2, 2)}  # fmt: skip

# fmt: off
_TINY: dict[str, TinyBackbone] = {
    # tokens, native or interpolated positions
    "vit": TinyBackbone("ViTConfig", VIT, prefix=1, **SMALL),
    "deit": TinyBackbone("DeiTConfig", VIT, prefix=2, **SMALL),
    "vit_mae": TinyBackbone("ViTMAEConfig", VIT | {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2}, prefix=1, **SMALL),
    "vit_msn": TinyBackbone("ViTMSNConfig", VIT, prefix=1, **SMALL),
    "ijepa": TinyBackbone("IJepaConfig", VIT, **SMALL),
    "yolos": TinyBackbone("YolosConfig", VIT | {"image_size": [32, 48], "num_detection_tokens": 5}, size=(32, 48),
        grid=(4, 6), prefix=1, suffix=5, other_size=(24, 40), other_grid=(3, 5)),
    "beit": TinyBackbone("BeitConfig", VIT | {"use_absolute_position_embeddings": True}, prefix=1, **SMALL),
    "data2vec-vision": TinyBackbone("Data2VecVisionConfig", VIT | {"use_relative_position_bias": True}, prefix=1,
        **SMALL),
    "dpt": TinyBackbone("DPTConfig", VIT, prefix=1, **SMALL),
    "dinov2": TinyBackbone("Dinov2Config", DINO, prefix=1, **SMALL),
    "dinov2_with_registers": TinyBackbone("Dinov2WithRegistersConfig", DINO, prefix=5, **SMALL),
    "dinov3_vit": TinyBackbone("DINOv3ViTConfig", VIT | {"num_register_tokens": 4}, prefix=5, **SMALL),
    "pixio": TinyBackbone("PixioConfig", DINO, prefix=8, **SMALL),
    "tipsv2_vision_model": TinyBackbone("Tipsv2VisionConfig", DINO, prefix=2, **SMALL),
    "radio": TinyBackbone("RadioConfig", DINO | {"max_img_size": 64, "mlp_ratio": 1.0}, prefix=10, **SMALL),
    "sapiens2": TinyBackbone("Sapiens2Config", VIT | {"num_register_tokens": 3, "num_key_value_attention_heads": 2},
        prefix=4, **SMALL),
    "clip_vision_model": TinyBackbone("CLIPVisionConfig", VIT, prefix=1, **SMALL),
    "chinese_clip_vision_model": TinyBackbone("ChineseCLIPVisionConfig", VIT, prefix=1, **SMALL),
    "mlcd_vision_model": TinyBackbone("MLCDVisionConfig", VIT, prefix=1, **SMALL),
    "siglip_vision_model": TinyBackbone("SiglipVisionConfig", VIT, **SMALL),
    "aimv2_vision_model": TinyBackbone("Aimv2VisionConfig", VIT, **FIXED),
    "internvl_vision": TinyBackbone("InternVLVisionConfig", VIT, prefix=1, **SMALL),
    "qianfan_ocr_vision": TinyBackbone("QianfanOCRVisionConfig", VIT, prefix=1, **SMALL),
    "idefics3_vision": TinyBackbone("Idefics3VisionConfig", VIT, **SMALL),
    "smolvlm_vision": TinyBackbone("SmolVLMVisionConfig", VIT, **SMALL),
    "sam3_vit_model": TinyBackbone("Sam3ViTConfig", SAM3, **FIXED),
    "sam3_vision_model": TinyBackbone("Sam3VisionConfig", {"backbone_config": SAM3 | {"model_type": "sam3_vit_model"},
        "fpn_hidden_size": 8}, **FIXED),
    # tokens of a pyramid
    "dinov3_convnext": TinyBackbone("DINOv3ConvNextConfig",
        {"image_size": 128, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 32]}, prefix=1, **LARGE),
    "pvt": TinyBackbone("PvtConfig", PYRAMID | {"image_size": 128}, prefix=1, size=(128, 128), grid=(4, 4)),
    "levit": TinyBackbone("LevitConfig", {"image_size": 256, "hidden_sizes": (16, 16, 32),
        "num_attention_heads": (1, 2, 2), "depths": (1, 1, 1), "key_dim": (8, 8, 8)}, size=(256, 256),
        grid=(4, 4)),
    "swin": TinyBackbone("SwinConfig", SWIN, **MEDIUM),
    "swinv2": TinyBackbone("Swinv2Config", SWIN, **MEDIUM),
    "donut-swin": TinyBackbone("DonutSwinConfig", SWIN, **MEDIUM),
    "maskformer-swin": TinyBackbone("MaskFormerSwinConfig", SWIN, **MEDIUM),
    "focalnet": TinyBackbone("FocalNetConfig", {"image_size": 64, "embed_dim": 8, "depths": (1, 1, 1),
        "hidden_sizes": (8, 16, 32), "mlp_ratio": 1.0, "focal_levels": (1, 1, 1), "focal_windows": (3, 3, 3)},
        **MEDIUM),
    "hiera": TinyBackbone("HieraConfig", {"image_size": (64, 64), "embed_dim": 8, "depths": (1, 1, 1),
        "num_heads": (1, 1, 2), "num_query_pool": 2, "masked_unit_size": (4, 4),
        "masked_unit_attention": (True, True, False)}, **MEDIUM),
    # maps
    "glpn": TinyBackbone("GLPNConfig", PYRAMID, **MAPS),
    "segformer": TinyBackbone("SegformerConfig", PYRAMID, **MAPS),
    "vitdet": TinyBackbone("VitDetConfig", DINO | {"pretrain_image_size": 32}, order="channels_first", **SMALL),
    "convnext": TinyBackbone("ConvNextConfig", STAGES | {"image_size": 128}, **MAPS),
    "convnextv2": TinyBackbone("ConvNextV2Config", STAGES | {"image_size": 128}, **MAPS),
    "resnet": TinyBackbone("ResNetConfig", STAGES | {"embedding_size": 8, "layer_type": "basic"}, **MAPS),
    "bit": TinyBackbone("BitConfig", STAGES | {"embedding_size": 8, "num_groups": 2}, **MAPS),
    "regnet": TinyBackbone("RegNetConfig", STAGES | {"embedding_size": 8, "groups_width": 8}, **MAPS),
    "efficientnet": TinyBackbone("EfficientNetConfig", EFFICIENT, **MAPS),
    "mobilenet_v1": TinyBackbone("MobileNetV1Config", {"image_size": 128, "depth_multiplier": 0.05}, **MAPS),
    "mobilenet_v2": TinyBackbone("MobileNetV2Config", {"image_size": 128, "depth_multiplier": 0.1,
        "finegrained_output": False, "expand_ratio": 2.0}, **MAPS),
    "mobilevit": TinyBackbone("MobileViTConfig", {"image_size": 128, "hidden_sizes": (8, 8, 16),
        "neck_hidden_sizes": (8, 8, 8, 8, 8, 16, 32), "num_attention_heads": 2, "expand_ratio": 2.0}, **MAPS),
    "mobilevitv2": TinyBackbone("MobileViTV2Config", {"image_size": 128, "width_multiplier": 0.125,
        "n_attn_blocks": (1, 1, 1)}, **MAPS),
    "poolformer": TinyBackbone("PoolFormerConfig", STAGES | {"mlp_ratio": 1.0}, **MAPS),
    "swiftformer": TinyBackbone("SwiftFormerConfig", {"image_size": 128, "depths": (1, 1, 1, 1),
        "embed_dims": (8, 8, 16, 32), "mlp_ratio": 1}, **MAPS),
    "hgnet_v2": TinyBackbone("HGNetV2Config", STAGES | {"embedding_size": 8, "stem_channels": (3, 8, 8),
        "stage_in_channels": (8, 8, 8, 16), "stage_mid_channels": (8, 8, 8, 8),
        "stage_out_channels": (8, 8, 16, 32), "stage_num_blocks": (1, 1, 1, 1),
        "stage_numb_of_layers": (1, 1, 1, 1)}, output="feature_maps", **MAPS),
    "textnet": TinyBackbone("TextNetConfig", {"image_size": (128, 128), "stem_out_channels": 8,
        "hidden_sizes": (8, 8, 8, 16, 32), "conv_layer_kernel_sizes": [[[3, 3]]] * 4,
        "conv_layer_strides": [[2]] * 4}, **MAPS),
    "cvt": TinyBackbone("CvtConfig", {"embed_dim": (8, 16, 32), "num_heads": (1, 1, 2), "depth": (1, 2, 3),
        "mlp_ratio": (1.0, 1.0, 1.0)}, order="channels_first", **MEDIUM),
    "pvt_v2": TinyBackbone("PvtV2Config", PYRAMID | {"image_size": 128}, **MAPS),
    "swin2sr": TinyBackbone("Swin2SRConfig", {"image_size": 8, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2),
        "window_size": 4}, size=(8, 8), grid=(8, 8), order="channels_first", other_size=(8, 12),
        other_grid=(8, 12)),
    "sam_vision_model": TinyBackbone("SamVisionConfig", SAM, order="channels_first", **FIXED),
    "sam_hq_vision_model": TinyBackbone("SamHQVisionConfig", SAM, order="channels_first", **FIXED),
    "sam2_hiera_det_model": TinyBackbone("Sam2HieraDetConfig", HIERA_DET, order="channels_last", **LARGE),
    "sam2_vision_model": TinyBackbone("Sam2VisionConfig",
        {"backbone_config": HIERA_DET | {"model_type": "sam2_hiera_det_model"}, "fpn_hidden_size": 8,
        "backbone_channel_list": [32, 16, 8, 4], "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]},
        order="channels_last", **LARGE),
    # packed
    "siglip2_vision_model": TinyBackbone("Siglip2VisionConfig", SIGLIP2, order="packed", **SMALL),
    "pixtral": TinyBackbone("PixtralVisionConfig", VIT, order="packed", **SMALL),
    # clips
    "videomae": TinyBackbone("VideoMAEConfig", VIT | {"num_frames": 4, "tubelet_size": 2}, size=(32, 32),
        grid=(2, 4, 4), frames=4),
    "timesformer": TinyBackbone("TimesformerConfig", VIT | {"num_frames": 4}, size=(32, 32), grid=(4, 4, 4), prefix=1,
        order="time_last", frames=4, other_size=(16, 48), other_grid=(4, 2, 6)),
    "vivit": TinyBackbone("VivitConfig", MLP | {"image_size": 32, "num_frames": 4, "tubelet_size": [2, 8, 8]},
        size=(32, 32), grid=(2, 4, 4), prefix=1, frames=4),
    "vjepa2": TinyBackbone("VJEPA2Config", DEPTH | {"patch_size": 8, "crop_size": 32, "frames_per_clip": 4,
        "mlp_ratio": 1.0, "pred_hidden_size": 16, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1,
        "pred_mlp_ratio": 1.0, "num_pooler_layers": 1}, size=(32, 32), grid=(2, 4, 4), frames=4,
        other_size=(24, 40), other_grid=(2, 3, 5)),
    "videoprism_vision_model": TinyBackbone("VideoPrismVisionConfig", MLP | {"image_size": 32, "num_frames": 4,
        "tubelet_size": [1, 8, 8], "num_spatial_layers": 1, "num_temporal_layers": 1, "num_auxiliary_layers": 1},
        size=(32, 32), grid=(4, 4, 4), frames=4, other_size=(24, 40), other_grid=(4, 3, 5)),
}
# fmt: on

TEXT = MLP | {"num_hidden_layers": 1, "vocab_size": 64, "max_position_embeddings": 16, "pad_token_id": 0,
              "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
CLIP = {"text_config": TEXT, "vision_config": VIT, "projection_dim": 16}
LLAMA = {"text_config": TEXT | {"model_type": "llama"}}
# towers that AutoModel loads, alone and out of the full model's folder; alone only; not at all
EXACT = {"tower": "vision_model", "exact": True, "known": True}
ALONE = {"tower": "vision_model", "known": True}
HIDDEN = {"tower": "vision_model", "prefix": 1}

# fmt: off
_COMPOSITES: dict[str, TinyComposite] = {
    "clip": TinyComposite("CLIPConfig", CLIP, tower_type="clip_vision_model", prefix=1, **EXACT),
    "siglip": TinyComposite("SiglipConfig", {"text_config": TEXT | {"projection_size": 32}, "vision_config": VIT},
        tower_type="siglip_vision_model", **EXACT),
    "siglip2": TinyComposite("Siglip2Config", {"text_config": TEXT | {"projection_size": 32},
        "vision_config": SIGLIP2}, tower_type="siglip2_vision_model", order="packed", **EXACT),
    "chinese_clip": TinyComposite("ChineseCLIPConfig", CLIP, tower_type="chinese_clip_vision_model", prefix=1,
        **EXACT),
    "tipsv2": TinyComposite("Tipsv2Config", {"text_config": TEXT, "vision_config": DINO},
        tower_type="tipsv2_vision_model", prefix=2, **EXACT),
    "aimv2": TinyComposite("Aimv2Config", CLIP, tower_type="aimv2_vision_model", **ALONE),
    "idefics3": TinyComposite("Idefics3Config", LLAMA | {"vision_config": VIT}, tower_type="idefics3_vision", **ALONE),
    "smolvlm": TinyComposite("SmolVLMConfig", LLAMA | {"vision_config": VIT}, tower_type="smolvlm_vision", **ALONE),
    "llava": TinyComposite("LlavaConfig", LLAMA | {"vision_config": VIT | {"model_type": "clip_vision_model"}},
        tower="vision_tower", tower_type="clip_vision_model", prefix=1, known=True),
    "paligemma": TinyComposite("PaliGemmaConfig", {"vision_config": VIT | {"model_type": "siglip_vision_model"},
        "projection_dim": 32, "vocab_size": 64, "hidden_size": 32, "text_config": TEXT | {"model_type": "gemma",
        "num_key_value_heads": 2, "head_dim": 16}}, tower="vision_tower", tower_type="siglip_vision_model",
        known=True),
    "altclip": TinyComposite("AltCLIPConfig", CLIP | {"text_config": TEXT | {"project_dim": 16}},
        tower_type="altclip_vision_model", **HIDDEN),
    "metaclip_2": TinyComposite("MetaClip2Config", CLIP, tower_type="metaclip_2_vision_model", **HIDDEN),
    "clipseg": TinyComposite("CLIPSegConfig", CLIP, tower_type="clipseg_vision_model", **HIDDEN),
    "owlvit": TinyComposite("OwlViTConfig", CLIP, tower_type="owlvit_vision_model", **HIDDEN),
    "owlv2": TinyComposite("Owlv2Config", CLIP, tower_type="owlv2_vision_model", **HIDDEN),
    "blip": TinyComposite("BlipConfig", CLIP | {"text_config": TEXT | {"encoder_hidden_size": 32}},
        tower_type="blip_vision_model", **HIDDEN),
    "blip-2": TinyComposite("Blip2Config", {"vision_config": VIT, "qformer_config": TEXT | {"encoder_hidden_size": 32},
        "num_query_tokens": 2, "text_config": TEXT | {"model_type": "opt", "ffn_dim": 32,
        "word_embed_proj_dim": 32}}, tower_type="blip_2_vision_model", **HIDDEN),
    "flava": TinyComposite("FlavaConfig", {"image_config": VIT, "text_config": TEXT, "multimodal_config": MLP,
        "hidden_size": 32, "projection_dim": 16, "image_codebook_config": {"hidden_size": 8, "vocab_size": 16,
        "num_blocks_per_group": 1}}, tower="image_model", tower_type="flava_image_model", prefix=1,
        tower_config="image_config"),
    "align": TinyComposite("AlignConfig", {"text_config": TEXT, "vision_config": EFFICIENT, "projection_dim": 32},
        tower="vision_model", tower_type="align_vision_model", size=(128, 128), order="channels_first"),
}
# fmt: on

TINY_BACKBONES = {name: tiny for name, tiny in _TINY.items() if hasattr(transformers, tiny.config_class)}
COMPOSITES = {name: tiny for name, tiny in _COMPOSITES.items() if hasattr(transformers, tiny.config_class)}
MISSING = sorted((_TINY.keys() | _COMPOSITES.keys()) - TINY_BACKBONES.keys() - COMPOSITES.keys())
"""Types that this version of transformers does not have yet."""
