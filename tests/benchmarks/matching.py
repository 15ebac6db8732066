"""What an evaluation of matching costs beside the bare forward passes over its views."""

from pathlib import Path

import torch
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessorPil

from soap_hf import Examples, SOAPModelWrapper, SOAPStatistics, evaluation
from soap_hf.data.data_sets import open_dataset
from soap_hf.evaluation.matching import match_views
from soap_hf.evaluation.strength import STRENGTHS
from soap_hf.evaluation.views import ViewRule
from soap_hf.heads.running import head_preprocessor
from tests.benchmarks.timing import Comparison, medians

PHOTOS = Path(__file__).parents[2] / "examples" / "photos" / "heldout"
IMAGES, SIZE = 8, 224


def match_by_all_methods() -> Comparison:
    """ViT-S/14 at 224 pixels: raw tokens, three methods and eleven strengths against the backbone alone."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=SIZE, patch_size=14)
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})
    backbone = Dinov2Model(config).to(device).eval()
    model = SOAPModelWrapper.from_backbone(backbone, None, image_processor=processor)
    statistics = SOAPStatistics.from_tokens(*torch.randn(2, 8, 16, 16, 384))
    strengths = {f"{mu:g}": statistics.projection(mu).to(device) for mu in (*STRENGTHS, 5, 7, 9)}
    images = Examples(open_dataset(PHOTOS), num_images=IMAGES)
    compared = evaluation.Comparison(model, -1, head_preprocessor(model), {"raw": strengths["0"], **strengths})
    views = torch.randn(2 * IMAGES, 3, SIZE, SIZE)

    @torch.no_grad()
    def bare() -> None:
        backbone(views.to(device)).last_hidden_state.cpu()

    candidates = {
        "matching by 14 methods": lambda: match_views([compared], images, rule=ViewRule(), batch_size=16),
        "bare forward passes": bare,
    }
    seconds = medians(candidates, repeats=7, warm_up=2, units=dict.fromkeys(candidates, IMAGES))
    ratio = seconds["matching by 14 methods"] / seconds["bare forward passes"]
    return Comparison(
        title=f"Matching between views, ViT-S/14 at {SIZE} pixels on {device.type}, per photograph",
        seconds=seconds,
        ratios={"matching / bare": ratio},
        targets={"matching / bare": "≤ 1.25"},
    )
