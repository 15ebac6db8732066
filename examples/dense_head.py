"""A segmentation head on clean tokens: UperNet on a SOAP backbone, a few steps of training on the photographs here.

    python examples/dense_head.py [--steps 30]

There are no masks in examples/photos, so the head learns a target that every photograph brings along: which of four
bands of brightness a pixel belongs to. The backbone stays frozen; only the UperNet head is trained.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers import UperNetConfig, UperNetForSemanticSegmentation
from transformers.utils import logging

from soap_hf import SOAPBackbone, fit_soap

HERE = Path(__file__).parent
NUM_BANDS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="steps of training")
    steps = parser.parse_args().steps
    logging.disable_progress_bar()
    torch.manual_seed(0)

    fitted = fit_soap(HERE / "vit-mae-tiny", HERE / "photos" / "fit", layer=[2, 4, -1], progress=False)
    backbone = SOAPBackbone.from_backbone(
        fitted.backbone, {layer: fitted.projections[str(layer)] for layer in fitted.config.layers}
    )
    model = segmenter(backbone)
    train, held_out = (pixels_of(fitted, HERE / "photos" / folder) for folder in ("fit", "heldout"))
    print(f"Before: {accuracy(model, held_out):.1%} of the pixels of held-out photographs in the right band.")
    train_head(model, train, steps)
    print(f"After {steps} steps: {accuracy(model, held_out):.1%}.")


def segmenter(backbone: SOAPBackbone) -> UperNetForSemanticSegmentation:
    """UperNet with a random head on a frozen backbone."""
    config = UperNetConfig(
        backbone_config=backbone.config, num_labels=NUM_BANDS, hidden_size=32, use_auxiliary_head=False
    )
    model = UperNetForSemanticSegmentation(config)
    model.backbone = backbone.requires_grad_(False)  # built from a config, it has random weights
    return model


def train_head(model: UperNetForSemanticSegmentation, pixels: torch.Tensor, steps: int) -> None:
    """A few steps on random batches."""
    optimiser = torch.optim.AdamW(model.decode_head.parameters(), lr=2e-3)
    model.train()
    model.backbone.eval()
    for _ in range(steps):
        batch = pixels[torch.randint(len(pixels), (16,))]
        loss = model(batch, labels=bands(batch)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@torch.no_grad()
def accuracy(model: UperNetForSemanticSegmentation, pixels: torch.Tensor) -> float:
    """Share of pixels in the right band."""
    return (model.eval()(pixels).logits.argmax(1) == bands(pixels)).float().mean().item()


def bands(pixels: torch.Tensor) -> torch.Tensor:
    """Which quarter of its photograph's range of brightness each pixel lies in, (B, H, W)."""
    brightness = pixels.mean(1)
    edges = torch.quantile(brightness.flatten(1), torch.tensor([0.25, 0.5, 0.75]), dim=1)
    return sum((brightness > edge.view(-1, 1, 1)).long() for edge in edges)


def pixels_of(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    """The photographs of a folder as the backbone expects them."""
    images = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))]
    return model.image_processor(images, return_tensors="pt")["pixel_values"]


if __name__ == "__main__":
    main()
