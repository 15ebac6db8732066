"""Adding up statistics, against the backbone's forward pass that a fit needs anyway."""

import torch
from transformers import AutoModel, Dinov2Config

from soap_hf.statistics.token_statistics import ResponseCounts, TokenMoments
from tests.benchmarks.timing import Comparison, medians

DIM, GRID, IMAGES = 384, (16, 16), 32
IMAGES_FORWARD = 8


@torch.inference_mode()
def stream_statistics() -> Comparison:
    """Seconds an image: each image of a fit passes through the backbone, moments count real images only."""
    tokens = torch.randn(IMAGES, *GRID, DIM)
    moments = TokenMoments(DIM).update(tokens)
    counts = ResponseCounts(moments.principal_components(), GRID)
    config = Dinov2Config(hidden_size=DIM, num_hidden_layers=12, num_attention_heads=6, image_size=224, patch_size=14)
    backbone = AutoModel.from_config(config).eval()
    pixels = torch.randn(IMAGES_FORWARD, 3, 224, 224)
    candidates = {
        "TokenMoments.update": lambda: moments.update(tokens),
        "ResponseCounts.update": lambda: counts.update(tokens),
        "forward pass, ViT-S/14": lambda: backbone(pixels),
    }
    units = {"TokenMoments.update": IMAGES, "ResponseCounts.update": IMAGES, "forward pass, ViT-S/14": IMAGES_FORWARD}
    seconds = medians(candidates, repeats=10, warm_up=2, units=units)
    return Comparison(
        title=f"Statistics of {GRID[0]} x {GRID[1]} tokens of width {DIM}, per image",
        seconds=seconds,
        ratios={
            f"{update} / forward pass": seconds[update] / seconds["forward pass, ViT-S/14"]
            for update in ("TokenMoments.update", "ResponseCounts.update")
        },
        targets={},
    )
