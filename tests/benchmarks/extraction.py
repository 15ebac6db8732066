"""Extracting features of photographs into shards, beside a loop that decodes them and runs the backbone."""

import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, concatenate_datasets
from PIL import Image
from transformers import ViTConfig, ViTModel

from soap_hf import SOAPModelWrapper, SOAPProjection
from soap_hf.data.data_sets import open_dataset
from soap_hf.data.preprocessing import load_image_processor
from soap_hf.extract.extraction import extract_features
from tests.benchmarks.timing import Comparison, medians

PHOTOS = Path(__file__).parents[2] / "examples" / "photos" / "fit"
BATCH = 16
TIMES = 4
"""How often each photograph is read: throughput is asked of more images than the demo has."""


def extract_from_photographs(repeats: int = 3) -> Comparison:
    """A random ViT-S/14 at 224 pixels on photographs of the demo, decoded in a process beside the backbone."""
    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, patch_size=14)
    vit = ViTModel(config, add_pooling_layer=False).eval()
    head = SOAPProjection(torch.linalg.qr(torch.randn(384, 2)).Q, torch.full((2,), 0.9))
    processor = load_image_processor(None, (224, 224))
    model = SOAPModelWrapper.from_backbone(vit, head, image_processor=processor)
    paths = sorted(PHOTOS.glob("*.jpg")) * TIMES

    @torch.no_grad()
    def bare_loop() -> torch.Tensor:
        features = []
        for start in range(0, len(paths), BATCH):
            images = [Image.open(path).convert("RGB") for path in paths[start : start + BATCH]]
            features.append(vit(processor(images, return_tensors="pt")["pixel_values"]).last_hidden_state.mean(1))
        return torch.cat(features)

    with tempfile.TemporaryDirectory() as folder:
        rows = concatenate_datasets([cast(Dataset, open_dataset(PHOTOS))] * TIMES)
        stream = rows.to_iterable_dataset()
        options: dict[str, Any] = {"batch_size": BATCH, "num_workers": 1, "overwrite": True, "progress": False}
        candidates = {
            "bare loop": bare_loop,
            "rows": lambda: extract_features(model, rows, Path(folder, "rows"), **options),
            "stream": lambda: extract_features(model, stream, Path(folder, "stream"), **options),
            "patches": lambda: extract_features(model, rows, Path(folder, "patches"), patches=True, **options),
        }
        seconds = medians(candidates, repeats=repeats, warm_up=1)
    ratios = {
        f"throughput, {name} / bare loop": seconds["bare loop"] / seconds[name]
        for name in candidates.keys() - {"bare loop"}
    }
    return Comparison(
        title=f"{len(paths)} photographs, ViT-S/14 at 224 pixels, batch {BATCH}",
        seconds=seconds,
        ratios=dict(sorted(ratios.items())),
        targets=dict.fromkeys(ratios, "> 0.95"),
    )
