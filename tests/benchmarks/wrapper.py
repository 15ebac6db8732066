"""Time spent in the wrapper outside the backbone's forward pass, measured inside the same calls."""

import statistics
import time

import torch
from transformers import ViTConfig, ViTModel

from soap_hf import SOAPModelWrapper, SOAPProjection
from tests.benchmarks.timing import Comparison

BATCH = 8


@torch.inference_mode()
def wrap_backbone(repeats: int = 7) -> Comparison:
    """A random ViT-B/16 at 224 pixels under a head that removes two directions."""
    vit = ViTModel(ViTConfig(), add_pooling_layer=False).eval()
    head = SOAPProjection(torch.linalg.qr(torch.randn(768, 2)).Q, torch.full((2,), 0.9))
    model = SOAPModelWrapper.from_backbone(vit, head).eval()
    marks: list[float] = []
    vit.register_forward_pre_hook(lambda *_: marks.append(time.perf_counter()))
    vit.register_forward_hook(lambda *_: marks.append(time.perf_counter()))
    inside, outside = [], []
    pixels = torch.randn(BATCH, 3, 224, 224)
    for _ in range(repeats + 1):
        marks.clear()
        start = time.perf_counter()
        model(pixels)
        total = time.perf_counter() - start
        inside.append(marks[1] - marks[0])
        outside.append(total - inside[-1])
    seconds = {"backbone": statistics.median(inside[1:]), "wrapper beside it": statistics.median(outside[1:])}
    return Comparison(
        title=f"ViT-B/16, batch {BATCH}, 224 pixels",
        seconds=seconds,
        ratios={"wrapper / backbone": seconds["wrapper beside it"] / seconds["backbone"]},
        targets={"wrapper / backbone": "< 0.02"},
    )
