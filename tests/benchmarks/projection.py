"""Removing directions as two skinny products, against the dense product and a mere copy."""

import torch

from soap_hf import SOAPProjection
from tests.benchmarks.timing import Comparison, medians

SHAPE = (32, 196, 768)
RANKS = (0, 2, 8)


@torch.inference_mode()
def apply_projection() -> Comparison:
    """A batch of ViT-B/16 tokens in float32."""
    tokens = torch.randn(SHAPE)
    directions = torch.linalg.qr(torch.randn(SHAPE[-1], max(RANKS))).Q
    projections = {rank: SOAPProjection(directions[:, :rank], torch.full((rank,), 0.9)) for rank in RANKS}
    dense = projections[2].matrix()
    candidates = {f"projection, k = {rank}": lambda rank=rank: projections[rank](tokens) for rank in RANKS}
    seconds = medians(
        {**candidates, "dense product": lambda: tokens @ dense.T, "clone": tokens.clone}, repeats=50, warm_up=5
    )
    return Comparison(
        title=f"Projection of {' x '.join(map(str, SHAPE))} tokens",
        seconds=seconds,
        ratios={
            "dense product / projection, k = 2": seconds["dense product"] / seconds["projection, k = 2"],
            "projection, k = 2 / clone": seconds["projection, k = 2"] / seconds["clone"],
            "projection, k = 8 / clone": seconds["projection, k = 8"] / seconds["clone"],
        },
        targets={"dense product / projection, k = 2": "≥ 10", "projection, k = 2 / clone": "≤ 6"},
    )
