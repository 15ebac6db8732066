"""A head in the vision tower of a model of images and text: attached, folded into its projector, and out again.

    python examples/vision_language.py

The model is a LLaVA built around the backbone in this folder, with a projector and a language model of random weights:
what it says means nothing, where the tokens go is the same as in a large one.
"""

from pathlib import Path

import torch
from PIL import Image
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, ViTModel
from transformers.utils import logging

from soap_hf import attach_soap, fit_soap, fold, unfold

HERE = Path(__file__).parent
LAYER = 5
"""The hidden state that this LLaVA reads; a head must be fitted on the one that the model reads."""


def main() -> None:
    logging.disable_progress_bar()
    torch.manual_seed(0)
    # the encoder of a ViT-MAE, without its masking, is a ViT
    vit = ViTModel.from_pretrained(HERE / "vit-mae-tiny", add_pooling_layer=False, dtype=torch.float32)
    fitted = fit_soap(vit, HERE / "photos" / "fit", layer=LAYER, progress=False)
    model = language_model_with_eyes(fitted.backbone)
    photo = Image.open(sorted((HERE / "photos" / "heldout").glob("*.jpg"))[0]).convert("RGB")
    pixels = fitted.image_processor(photo, return_tensors="pt")["pixel_values"]

    raw = image_features(model, pixels)
    with attach_soap(model, fitted):
        attached = image_features(model, pixels)
    print(f"Attached, the image's {len(raw)} tokens for the language model change by {change(raw, attached):.1%}.")
    folding = fold(model, fitted)
    difference = change(attached, image_features(model, pixels))
    print(f"Folded into {', '.join(folding.deltas)}, they differ from those by {difference:.0e}.")
    unfold(model, folding)
    print(f"Unfolded, they differ from the first by {change(raw, image_features(model, pixels)):.0e}.")


def language_model_with_eyes(backbone: torch.nn.Module) -> LlavaForConditionalGeneration:
    """A LLaVA with this backbone for its vision tower."""
    text = LlamaConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64
    )
    config = LlavaConfig(vision_config=backbone.config, text_config=text, vision_feature_layer=LAYER)
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower = backbone
    return model


@torch.no_grad()
def image_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """What the language model is given of an image, (patches, width)."""
    return model.get_image_features(pixels).pooler_output[0]


def change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Length of the difference, as a share of the length of what was there before."""
    return ((after - before).norm() / before.norm()).item()


if __name__ == "__main__":
    main()
